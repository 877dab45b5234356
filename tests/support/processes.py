"""Read the state of processes from Linux."""

from pathlib import Path

from benchmarks.turns import process_tree


def read_stat(process: int) -> list[str]:
    """Return the fields of `/proc/<pid>/stat` from the state on.

    A process that is gone has the state of a dead one.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X", "0"]


def has_ended(process: int) -> bool:
    """Return whether a process is gone or a zombie."""
    return read_stat(process)[0] in "XZ"


def worker_processes(process: int) -> list[int]:
    """Return the worker processes of a process (semiscale/common/worker_process.py)."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in process_tree(process)}
    return [child for child, command in commands.items() if b"semiscale.common.worker_process" in command]
