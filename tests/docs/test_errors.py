"""Every error has an id that `docs/errors.md` explains, and the page has no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {
    *("SemiscaleError", "InvalidInputError", "TooManyBadSamplesError"),
    *("BudgetExceededError", "TerminatedError"),
}
ID = re.compile(r"SEMI-E\d{3}")
SECTION = re.compile(
    r"^### (SEMI-E\d{3}): .+\n\n\*\*Cause\.\*\* .+\n\n\*\*What to do\.\*\* (?:.+\n)+\n\*\*Exit code\.\*\* .+", re.M
)


def sources() -> list[Path]:
    """Return the modules of the program."""
    return sorted([*(ROOT / "semiscale").rglob("*.py"), *(ROOT / "components").rglob("*.py")])


def errors_built(path: Path) -> Iterator[ast.Call]:
    """Yield every place of a module where an error is built."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ERRORS:
                yield node


def test_every_error_is_built_with_an_id() -> None:
    without = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sources()
        for call in errors_built(path)
        if len(call.args) < 2 or (isinstance(call.args[0], ast.Constant) and not ID.fullmatch(str(call.args[0].value)))
    ]
    assert without == []


def test_the_page_explains_every_id_and_no_other() -> None:
    used = {code for path in sources() for code in ID.findall(path.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = SECTION.findall(page)
    assert len(set(explained)) == len(explained)
    assert explained == sorted(explained)
    assert set(explained) == set(re.findall(r"^### (SEMI-E\d{3})", page, re.M))
    assert used == set(explained)
