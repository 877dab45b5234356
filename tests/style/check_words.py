"""Find words that the style rules ban, in identifiers and at the start of docstrings.

    python -m tests.style.check_words

prints a line for each place and exits with 1 if there is one. CONTRIBUTING.md has the rules.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ("pipeline.py", "components", "semiscale", "docs", "benchmarks", "tests")
# Private words, and words that say nothing, as identifiers or as parts of them.
BANNED_PARTS = {"ahead", "beside", "lifeline", "told", "said", "dealt", "reign", "manner", "utils", "helpers", "misc"}
# As a whole name of a variable, function or argument.
BANNED_NAMES = {"one", "found", "located", "fed", "data2"}
# Names that are stored, public, or another library's, by module.
ALLOWED = {"semiscale/receipts/merge.py": {"found"}}
# Connectors: a sentence has its subject first.
BANNED_STARTS = {"What", "Who", "Of", "Where", "So"}


def names_of(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a node binds, with their lines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name, node.lineno
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, ast.arg):
        yield node.arg, node.lineno
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr, node.lineno


def problems_in(path: Path) -> Iterator[str]:
    """Yield a line for every banned word of a module."""
    where = path.relative_to(ROOT)
    for part in path.stem.split("_"):
        if part in BANNED_PARTS:
            yield f"{where}: the module's name has {part!r}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name, line in names_of(node):
            parts = set(name.strip("_").lower().split("_"))
            if name not in ALLOWED.get(str(where), ()) and (parts & BANNED_PARTS or name.strip("_") in BANNED_NAMES):
                yield f"{where}:{line}: the name {name!r}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if docstring.split(" ", 1)[0] in BANNED_STARTS:
                yield f"{where}:{getattr(node, 'lineno', 1)}: a docstring that begins with {docstring.split()[0]!r}"


def main() -> int:
    """Print every place; returns the exit code."""
    paths = [
        path for name in CHECKED for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    problems = [problem for path in sorted(paths) for problem in problems_in(path)]
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
