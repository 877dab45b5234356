"""Write the parts of the documentation that are generated from the program.

The run-file reference and the JSON Schema come from the model of the run file. The reference of the command line comes
from its parser, and the README of a component from its declaration. `python docs/generate.py` writes the schema and the
READMEs, which are part of the repository, and the includes, which are not.
"""

import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser
from kfp.dsl.python_component import PythonComponent
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from pipeline import semiscale as pipeline  # noqa: E402 - the repository's root has to be importable first

from semiscale.config.run_config import RunConfig as RunFileModel  # noqa: E402  # isort: skip
from semiscale.cli.main import build_parser  # noqa: E402  # isort: skip

INCLUDES = DOCS / "_generated"
SCHEMA = DOCS / "schema" / "run.schema.json"
PROGRAM = "semiscale"
HELP_WIDTH = "100"  # columns of the help texts
PAPER = re.compile(r"(?:sections?|Tables?|supplement) \d[\d.]*(?: (?:and|to) \d[\d.]*)?")
PAPER_IN_BRACKETS = re.compile(rf" \({PAPER.pattern}\)")  # the table has a column for it
NESTED_KEY = "hardware"  # the one key that is a section of its own

Json = dict[str, Any]


def main() -> None:
    """Write the schema and the includes."""
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(json_schema_text(), encoding="utf-8")
    for path, text in component_readmes().items():
        path.write_text(text, encoding="utf-8")
    write_includes()


def write_includes() -> None:
    """Write the Markdown files that pages include. Files that are up to date are left alone."""
    INCLUDES.mkdir(exist_ok=True)
    texts = {
        "run-file.md": run_file_tables(),
        "hardware.md": hardware_tables(),
        "command-line.md": command_line_reference(),
    }
    for name, text in texts.items():
        path = INCLUDES / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def json_schema_text() -> str:
    """Return the JSON Schema of a run file, as it is stored in the repository."""
    return json.dumps(run_file_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def run_file_schema() -> Json:
    """Return the JSON Schema of a run file.

    The model takes one URI where it declares a list of them. Pydantic cannot see that, so it is added here.
    """
    schema = RunFileModel.model_json_schema()
    for field in schema["properties"].values():
        if field.get("type") == "array" and field.get("items", {}).get("type") == "string":
            listed = {key: field.pop(key) for key in ("type", "items", "minItems") if key in field}
            field["anyOf"] = [field_of_one(listed["items"]), listed]
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{PROGRAM} run file"}
    return schema


def field_of_one(items: Json) -> Json:
    """Return the schema of a single URI in the place of a list."""
    return {key: value for key, value in items.items() if key in ("type", "pattern")}


def component_readmes() -> dict[Path, str]:
    """Return the README of every folder of components, by its path: each component, with its inputs and outputs."""
    readmes = {}
    for path in sorted((ROOT / "components").glob("*/component.py")):
        module = import_module(f"components.{path.parent.name}.component")
        declared = [member for member in vars(module).values() if isinstance(member, PythonComponent)]
        parts = [f"# {path.parent.name}", (module.__doc__ or "").strip(), *map(component_text, declared)]
        note = "The tables are generated from `component.py` by `make docs-generate`."
        readmes[path.parent / "README.md"] = "\n\n".join([*parts, note]) + "\n"
    return readmes


def component_text(component: PythonComponent) -> str:
    """Return the section of one component: its image, and the tables of its inputs and outputs."""
    docstring = docstring_parser.parse(component.python_func.__doc__ or "")
    spec = component.component_spec
    described = {parameter.arg_name: parameter.description for parameter in docstring.params}
    inputs = [
        (
            f"`{name}`",
            f"`{kfp_type(port.type)}`",
            "yes" if port.optional else "",
            prose(described.get(name) or form_text(name)),
        )
        for name, port in (spec.inputs or {}).items()
    ]
    outputs = [
        (f"`{name}`", f"`{kfp_type(port.type)}`", prose(port.description))
        for name, port in (spec.outputs or {}).items()
    ]
    text = "\n\n".join(filter(None, [docstring.short_description, docstring.long_description]))
    image = spec.implementation.container.image
    return (
        f"## {spec.name}\n\n{text}\n\nImage: `{image}`\n\n"
        f"{table(('input', 'type', 'optional', 'meaning'), inputs)}\n{table(('output', 'type', 'meaning'), outputs)}"
    ).rstrip()


def kfp_type(name: str) -> str:
    """Return the type of an input or output without its schema's version."""
    return name.partition("@")[0].removeprefix("system.").removeprefix("typing.")


def form_text(name: str) -> str:
    """Return the description of a run-file key; the plan has the form's."""
    field = RunFileModel.model_fields.get(name)
    return (field.description or "") if field else ""


def run_file_tables() -> str:
    """Return the table of all keys of a run file but the nested one, in the order of the model."""
    schema = run_file_schema()
    fields = {name: field for name, field in RunFileModel.model_fields.items() if name != NESTED_KEY}
    rows = [
        (
            f"[`{name}`]{{#key-{name.replace('_', '-')}}}",
            type_text(schema["properties"][name], schema),
            default_text(field),
            prose(field.description),
            paper_text(field),
        )
        for name, field in fields.items()
    ]
    return table(("key", "type", "default", "meaning", "paper"), rows)


def hardware_tables() -> str:
    """Return the table of the nested section: a machine for each kind of stages, and the section's own keys."""
    section = RunFileModel.model_fields[NESTED_KEY].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    machines = {name: model for name, field in section.model_fields.items() if (model := model_of(field))}
    keys = dict.fromkeys(key for model in machines.values() for key in model.model_fields)
    rows = []
    for key in keys:
        models = [model for model in machines.values() if key in model.model_fields]
        schema = models[0].model_json_schema()
        defaults = [default_text(model.model_fields[key]) if model in models else "" for model in machines.values()]
        rows.append((f"`{key}`", type_text(schema["properties"][key], schema), *defaults, inherited_prose(models, key)))
    of_machines = table(("key", "type", *(f"`{name}`" for name in machines), "meaning"), rows)
    schema = section.model_json_schema()
    own = [
        (f"`{name}`", type_text(schema["properties"][name], schema), default_text(field), prose(field.description))
        for name, field in section.model_fields.items()
        if name not in machines
    ]
    return f"{of_machines}\n{table(('key', 'type', 'default', 'meaning'), own)}"


def model_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a field nests; None if it nests none."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def inherited_prose(models: list[type[BaseModel]], key: str) -> str:
    """Return a key's description. A model that changes a default need not repeat it."""
    parents = [parent for model in models for parent in model.__mro__ if issubclass(parent, BaseModel)]
    descriptions = [parent.model_fields[key].description for parent in parents if key in parent.model_fields]
    return prose(next((text for text in descriptions if text), ""))


def type_text(field: Json, schema: Json) -> str:
    """Return a field's type and bounds in words.

    Args:
        field: The field's JSON Schema.
        schema: The model's JSON Schema, which has the definitions.
    """
    if "$ref" in field:
        field = {**schema["$defs"][field["$ref"].rpartition("/")[2]], **{k: v for k, v in field.items() if k != "$ref"}}
    if "allOf" in field:
        return type_text(field["allOf"][0], schema)
    if "enum" in field:
        return ", ".join(literal(value) for value in field["enum"])
    if "const" in field:
        return literal(field["const"])
    if "anyOf" in field:
        parts = [choice for choice in field["anyOf"] if choice.get("const") != ""]
        return " or ".join(type_text(choice, schema) for choice in parts)
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {type_text(field['items'], schema)}"
    if kind == "object":
        return "mapping"
    names = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false"}
    return " ".join([names.get(kind, kind), *bounds(field)])


def bounds(field: Json) -> list[str]:
    """Return the bounds of a number, in words."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    words = [f"{sign} {field[key]:,}" for key, sign in signs.items() if key in field]
    return [", ".join(words)] if words else []


def default_text(field: FieldInfo) -> str:
    """Return a field's default, or that it has none."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        value = [model.model_dump(exclude_defaults=True) for model in value]
    return literal(value)


def literal(value: object) -> str:
    """Return a value as a run file would have it."""
    if value in ("", [], {}):
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def paper_text(field: FieldInfo) -> str:
    """Return the part of the paper that states a key or its default; the declaration's own, or the description's."""
    extra = field.json_schema_extra
    declared = extra.get("paper") if isinstance(extra, dict) else None
    match = PAPER.search(field.description or "")
    return str(declared or (match[0] if match else ""))


def prose(text: str | None) -> str:
    """Return text for a cell of a table."""
    return " ".join(PAPER_IN_BRACKETS.sub("", text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def command_line_reference() -> str:
    """Return the help text of the program and of each command."""
    os.environ["COLUMNS"] = HELP_WIDTH
    parser = build_parser(pipeline)
    # The page states the exit codes once.
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    parts = [
        f"## `{name}`\n\n```text\n{help_text(command)}\n```\n"
        for name, command in ((PROGRAM, parser), *commands.items())
    ]
    return "\n".join(parts)


def help_text(parser: Any) -> str:
    """Return a parser's help, under the name of the installed command."""
    text: str = parser.format_help().partition("\nexit codes:")[0].rstrip()
    return text.replace("python pipeline.py", PROGRAM).replace("pipeline.py", PROGRAM)


if __name__ == "__main__":
    main()
