"""Test that `docs/errors.md` explains the id of every error, and no other id."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {
    *("SemiscaleError", "InvalidInputError", "TooManyBadSamplesError"),
    *("BudgetExceededError", "AbandonedError", "TerminatedError"),
}
ID = re.compile(r"SEMI-E\d{3}")
SECTION = re.compile(
    r"^### (SEMI-E\d{3}): .+\n\n\*\*Cause\.\*\* .+\n\n\*\*What to do\.\*\* (?:.+\n)+\n\*\*Exit code\.\*\* .+", re.M
)


def list_sources() -> list[Path]:
    """Return the modules of the program."""
    return sorted([*(ROOT / "semiscale").rglob("*.py"), *(ROOT / "components").rglob("*.py")])


def find_errors(path: Path) -> Iterator[ast.Call]:
    """Yield every call in a module that builds an error."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ERRORS:
                yield node


def test_every_error_has_an_id() -> None:
    calls_without_id = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in list_sources()
        for call in find_errors(path)
        if len(call.args) < 2 or (isinstance(call.args[0], ast.Constant) and not ID.fullmatch(str(call.args[0].value)))
    ]
    assert calls_without_id == []


def test_the_page_explains_every_id_and_no_other() -> None:
    used = {code for path in list_sources() for code in ID.findall(path.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = SECTION.findall(page)
    assert len(set(explained)) == len(explained)
    assert explained == sorted(explained)
    assert set(explained) == set(re.findall(r"^### (SEMI-E\d{3})", page, re.M))
    assert used == set(explained)
