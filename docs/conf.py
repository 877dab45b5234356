"""Settings of Sphinx for the user documentation; `make docs` builds it."""

import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

import generate  # noqa: E402 - it lies beside this file, which Sphinx does not import as a module

project = "semiscale"
author = "The semiscale authors"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_generated", "_build"]
# A reference that names nothing fails the build: `make docs` makes every warning an error.
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
# Headings down to this level can be linked to as page.md#heading.
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"semiscale {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
# The editors' schema is served beside the pages.
html_extra_path = ["schema"]
html_show_sphinx = False
html_show_copyright = False
# The text of a shell block is copied without its prompts.
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Any) -> None:
    """Write the generated parts before Sphinx reads the pages that include them.

    Args:
        app: The Sphinx application.
    """
    app.connect("builder-inited", lambda _: generate.write_includes())
