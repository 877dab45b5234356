"""Run a pipeline whose tasks are killed twice (killer/sitecustomize.py), as if they ran in supervised pods."""

from pathlib import Path

from semiscale.config.resources import SUPERVISION_ENV, Supervision

# The folder of the module that kills tasks.
KILLER = Path(__file__).parent / "killer"


def killer_environment(attempts: Path, *python_path: str) -> dict[str, str]:
    """Return the environment variables of tasks that are killed twice and started again.

    Args:
        attempts: Folder in which each task counts its attempts.
        python_path: More folders of modules.
    """
    return {
        SUPERVISION_ENV: Supervision(restarts=2, timeout_s=600).model_dump_json(),
        "PYTHONPATH": ":".join([str(KILLER), *python_path]),
        "ATTEMPTS": str(attempts),
    }


def count_attempts(attempts: Path) -> dict[str, int]:
    """Return the number of attempts of each task."""
    return {path.name: path.stat().st_size for path in attempts.iterdir()}
