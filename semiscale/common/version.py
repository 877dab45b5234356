"""Tell the version of the program."""

import tomllib
from importlib import metadata
from pathlib import Path

_PROJECT_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"


def program_version() -> str:
    """Return the version, such as `0.1.0`.

    A checkout and the container images have the project file. An installed package has metadata instead.
    """
    if _PROJECT_FILE.is_file():
        return str(tomllib.loads(_PROJECT_FILE.read_text())["project"]["version"])
    return metadata.version("semiscale")
