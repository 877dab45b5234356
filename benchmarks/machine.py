"""Describe the machine that a benchmark runs on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(device: str, *packages: str) -> str:
    """Return the processor, cores, load and versions in one line.

    Args:
        device: What else the figures depend on, such as the GPU or the memory.
        packages: Names of the packages whose versions count.
    """
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cores = f"{os.cpu_count()} cores, {device}, load {os.getloadavg()[0]:.1f}"
    versions = [f"{name} {version(name)}" for name in packages]
    return ", ".join([models[0].partition(": ")[2], cores, f"Python {platform.python_version()}", *versions])


def describe_gpu() -> str:
    """Return the name of the GPU, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
