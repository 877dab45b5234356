"""Test the documentation: a strict build, its contents, its links and its size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
MAX_README_LINES = 150
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)\s]*)?\)")
# This matches a path of the repository in backquotes. Paths with a placeholder name no file.
REPOSITORY_PATH = re.compile(r"`((?:components|docker|docs|manifests|requirements|tests|benchmarks)/[\w./-]+\w)`")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a strict build, in which every warning is an error."""
    folder = tmp_path_factory.mktemp("docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-b",
        "html",
        "-d",
        str(folder / "doctrees"),
    ]
    completed = subprocess.run([*command, str(DOCS), str(folder / "html")], capture_output=True, text=True)
    assert (completed.returncode, completed.stderr) == (0, "")
    return folder / "html"


def test_the_strict_build_has_every_page(html: Path) -> None:
    assert [page for page in PAGES if not (html / f"{page}.html").is_file()] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == [page for page in PAGES if page != "index"]


def test_the_readme_is_short_and_its_run_file_has_twelve_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES
    (run_file,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(run_file.splitlines()) == 12


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_links_of_top_level_pages_lead_to_files(name: str) -> None:
    links = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_anchors_of_the_readme_exist(html: Path) -> None:
    links = re.findall(r"\(docs/([\w-]+)\.md#([\w-]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for page, anchor in links:
        assert f'id="{anchor}"' in (html / f"{page}.html").read_text(encoding="utf-8"), (page, anchor)


@pytest.mark.parametrize("path", [*TOP_LEVEL, *(f"docs/{page}.md" for page in PAGES), "benchmarks/README.md"])
def test_files_that_a_page_names_exist(path: str) -> None:
    paths = REPOSITORY_PATH.findall((ROOT / path).read_text(encoding="utf-8"))
    generated = ("docs/_build", "docker/images.json")
    assert [name for name in paths if not name.startswith(generated) and not (ROOT / name).exists()] == []


def test_the_schema_in_the_repository_is_current() -> None:
    """`make docs-generate` writes the schema."""
    script = "import generate, sys; sys.stdout.write(generate.json_schema_text())"
    completed = subprocess.run([sys.executable, "-c", script], cwd=DOCS, capture_output=True, text=True, check=True)
    assert (DOCS / "schema" / "run.schema.json").read_text(encoding="utf-8") == completed.stdout


def test_the_readmes_of_the_components_are_current() -> None:
    """`make docs-generate` writes the READMEs."""
    script = "import generate, json; print(json.dumps({str(k): v for k, v in generate.component_readmes().items()}))"
    completed = subprocess.run([sys.executable, "-c", script], cwd=DOCS, capture_output=True, text=True, check=True)
    readmes = {Path(path): text for path, text in json.loads(completed.stdout).items()}
    assert {path.parent.name for path in readmes} == {
        path.parent.name for path in (ROOT / "components").glob("*/component.py")
    }
    assert [path for path, text in readmes.items() if path.read_text(encoding="utf-8") != text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "manifests" / "runs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_the_run_files_of_the_repository(path: Path) -> None:
    import jsonschema
    import yaml

    schema = json.loads((DOCS / "schema" / "run.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_schema_accepts_a_single_uri_and_refuses_an_unknown_key() -> None:
    import jsonschema

    schema = json.loads((DOCS / "schema" / "run.schema.json").read_text(encoding="utf-8"))
    run_file = {"name": "n", "workdir": "w", "labeled": "l", "unlabeled": ["u", "v"], "test": "t"}
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(run_file)
    assert not validator.is_valid({**run_file, "images_per_clas": 1})
    assert not validator.is_valid({key: value for key, value in run_file.items() if key != "test"})


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
def test_run_files_in_the_text_are_valid(path: str) -> None:
    import jsonschema
    import yaml

    schema = json.loads((DOCS / "schema" / "run.schema.json").read_text(encoding="utf-8"))
    required = {"name": "n", "workdir": "w", "labeled": "l", "unlabeled": "u", "test": "t"}
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL):
        jsonschema.Draft202012Validator(schema).validate(required | yaml.safe_load(block))


def test_the_package_has_the_licence_of_the_repository() -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License\n")
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
