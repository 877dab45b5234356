"""Compare values with the JSON files in `data`.

`WRITE_GOLDEN=1 pytest tests/golden` writes the files instead. A change of the content of users' workdirs needs more.
The program must still understand the older form, and a test must show it.
"""

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "data"


def check_equal(name: str, actual: Any) -> None:
    """Check that values equal the expected values of a name."""
    assert json.loads(json.dumps(actual)) == _expected(name, actual)


def check_nothing_lost(name: str, actual: Any) -> None:
    """Check that values have all expected values of a name. More values are fine."""
    assert missing_values(_expected(name, actual), json.loads(json.dumps(actual))) == []


def missing_values(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the paths of values in a JSON document that another lacks or has changed.

    New keys of an object are fine at any depth. Lists of names may have new names. Other lists have equal lengths.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            where
            for key, value in old.items()
            for where in (missing_values(value, new[key], f"{path}/{key}") if key in new else [f"{path}/{key}"])
        ]
    if isinstance(old, list) and isinstance(new, list):
        if all(isinstance(value, str) for value in old):
            return [f"{path}/{value}" for value in old if value not in new]
        if len(old) == len(new):
            pairs = enumerate(zip(old, new, strict=True))
            return [where for number, pair in pairs for where in missing_values(*pair, f"{path}/{number}")]
    return [] if old == new else [path]


def _expected(name: str, actual: Any) -> Any:
    path = HERE / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(json.dumps(actual, indent=1, ensure_ascii=False) + "\n")
    return json.loads(path.read_text())
