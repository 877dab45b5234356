"""Expected values, kept as JSON files beside the tests.

`WRITE_GOLDEN=1 pytest tests/golden` writes them instead of comparing. A change of what is stored in users' workdirs
needs more than that: the program must still understand the older form, and a test must show it.
"""

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def check(name: str, found: Any) -> None:
    """Compare what was found with the expected values of that name."""
    path = HERE / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert json.loads(json.dumps(found)) == json.loads(path.read_text())
