"""Processes that the tests have started, as Linux tells of them."""

from pathlib import Path

from benchmarks.turns import process_tree


def read_stat(process: int) -> list[str]:
    """Return what the kernel says of a process from its state on; of one that is gone, what it says of the dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def has_ended(process: int) -> bool:
    """Say whether a process is over: gone, or waiting for somebody to ask how it went."""
    return read_stat(process)[0] in "XZ"


def worker_processes(process: int) -> list[int]:
    """Return the processes that work beside another one (semiscale/common/worker_process.py)."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in process_tree(process)}
    return [child for child, command in commands.items() if b"semiscale.common.worker_process" in command]
