"""The two container images that all components run in; docker/ builds them.

CUDA: with torch, for what trains and scores. CPU: without it, for what lists, merges, packs and reports. The contracts
name them by version; a pipeline compiled for a run names them by the digests that `make images PUSH=…` wrote down.
"""

import json
import os
from pathlib import Path

CUDA_IMAGE = "semiscale/python-cuda:0.1.0"
CPU_IMAGE = "semiscale/python-cpu:0.1.0"
PUSHED_IMAGES_FILE = Path(
    os.environ.get("SEMISCALE_IMAGES", Path(__file__).resolve().parents[1] / "docker" / "images.json")
)


def load_pushed_images() -> dict[str, str]:
    """Return each image's name in the registry, digest included; nothing where none was pushed from this checkout."""
    found: dict[str, str] = json.loads(PUSHED_IMAGES_FILE.read_text()) if PUSHED_IMAGES_FILE.is_file() else {}
    return found
