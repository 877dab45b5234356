"""What every stage shares: a config that knows its digest, finished work that is found, and the ways in.

A stage is a function `stage(config) -> Receipt`. It is called from a test or a notebook as it is, from a shell by
`command_line`, and from a kfp component by `in_component`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from components.shared import lifeline, metrics, storage, tasks
from components.shared.errors import Refused, SemiscaleError
from components.shared.progress import as_json, duration, fail, say
from components.shared.receipts import Receipt
from components.shared.runfile import LATER, describe
from components.shared.summaries import summary

_RECEIPT = "receipt"
ReceiptUri = Annotated[str, _RECEIPT]
ReceiptUris = Annotated[list[str], _RECEIPT]
HOW = "how"  # marks a field that says how work is done and not what comes of it: it is no part of the digest


class StageConfig(BaseModel):
    """The inputs of a stage: where it works, its parameters, and the receipts of the stages before it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    stage: ClassVar[str]
    on_device: ClassVar[bool] = False  # whether its pod has a GPU: what a budget counts

    workdir: str
    """URI of the folder that everything bulky goes under."""

    def digest(self) -> str:
        """Return what identifies this work: the stage, its parameters, and the digests of its receipts.

        The workdir is left out, and what is marked HOW: the same work elsewhere or in another manner is the same work.
        So is what is marked LATER, at its default: it is what was done before it could be chosen.
        A stage that depends on more of a receipt than its digest says, or on less, overrides this.
        """
        content: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if _RECEIPT in field.metadata:
                uris = value if isinstance(value, list) else [value]
                content[name] = [_receipt_digest(uri) for uri in uris if uri]
            elif name != "workdir" and HOW not in field.metadata and not _as_before(field, value):
                content[name] = value
        return digest(self.stage, content)

    def task(self) -> str:
        """Return what tells this task from the others of its run, in the name of a file."""
        return self.stage

    def admit(self) -> None:
        """Raise Refused where this task may not begin: asked before its object says that it did."""

    def folder(self) -> str:
        """Return the URI of the folder that this work, and no other, is kept in."""
        return storage.join(self.workdir, "stages", self.stage, self.digest())


def _as_before(field: FieldInfo, value: Any) -> bool:
    return LATER in field.metadata and value == field.default


def digest(*parts: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON content."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _receipt_digest(uri: str) -> str:
    data = storage.read_if_there(uri)
    if data is None:
        raise Refused(f"{uri}: no receipt here; run the stage that writes it first")
    return str(json.loads(data)["digest"])


def in_the_workdir(config: "C") -> "C":
    """Return a config with its receipts named where they lie in the workdir, for a process on another machine.

    A kfp component is given copies of them on its own disk.
    """

    def placed(uri: str) -> str:
        return storage.join(json.loads(storage.read(uri))["folder"], "receipt.json") if uri else ""

    moved: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if _RECEIPT in field.metadata:
            moved[name] = [placed(uri) for uri in value] if isinstance(value, list) else placed(value)
    return config.model_copy(update=moved)


C = TypeVar("C", bound=StageConfig)
R = TypeVar("R", bound=Receipt)


def once(
    config: StageConfig,
    kind: type[R],
    work: Callable[[str], Mapping[str, Any]],
    folder: str | None = None,
    writes: bool = True,
) -> R:
    """Do a stage's work in its own folder, or find it done.

    `work(folder)` returns the fields of the receipt beyond the common ones, and may replace those. The receipt is
    written last, so a folder that has one is whole. Of several processes that work together, one `writes`.
    """
    folder = folder or config.folder()
    uri = storage.join(folder, "receipt.json")
    found = storage.read_if_there(uri)
    if found is not None:
        say(config.stage, f"finished before: {folder}")
        return kind.model_validate_json(found)
    started = time.monotonic()
    fields = work(folder)
    seconds = round(time.monotonic() - started, 3)
    common = {"stage": config.stage, "digest": config.digest(), "folder": folder, "seconds": seconds}
    receipt = kind.model_validate({**common, **fields})
    if writes and not storage.write(uri, receipt.model_dump_json(indent=1).encode(), if_absent=True):
        # Another process that did the same work was first; its receipt may have been read already.
        return kind.model_validate_json(storage.read(uri))
    say(config.stage, f"finished in {duration(seconds)}")
    return receipt


def command_line(config_type: type[C], stage: Callable[[C], Receipt], prints: bool = True) -> int:
    """Run a stage from a shell: options are the config's fields. Prints the receipt; returns the exit code."""
    settings = SettingsConfigDict(cli_kebab_case=True, cli_prog_name=f"python -m components.{config_type.stage}")
    options = type(config_type.__name__, (config_type, BaseSettings), {"model_config": settings})
    try:
        parsed: Any = CliApp.run(options, cli_args=sys.argv[1:])
    except ValidationError as error:
        fail(f"refused: {describe(error, config_type.model_fields)}", Refused.exit_code)
        return Refused.exit_code
    given = {name: getattr(parsed, name) for name in config_type.model_fields}
    indent = None if as_json(sys.stdout) else 1  # a line like the others, where lines are JSON

    def run() -> None:
        receipt = reporting(config_type(**given), stage)
        if prints:
            print(receipt.model_dump_json(indent=indent))

    return guarded(run)


def in_component(config_type: type[C], stage: Callable[[C], R], arguments: Mapping[str, Any]) -> R:
    """Run a stage inside a kfp component: its arguments are the config's fields, artifacts become their paths.

    Returns the receipt, which also goes to the output artifact `receipt`, and in words to `summary` where there is one.
    Exits with the error's code after one line.
    """
    lifeline.follow()
    given = {name: _plain(arguments[name]) for name in config_type.model_fields if name in arguments}
    receipts: list[R] = []
    if code := guarded(lambda: receipts.append(reporting(config_type(**given), stage))):
        sys.exit(code)
    Path(arguments["receipt"].path).write_text(receipts[0].model_dump_json(indent=1))
    if "summary" in arguments:
        Path(arguments["summary"].path).write_text(summary(receipts[0]))
    return receipts[0]


def reporting(config: C, stage: Callable[[C], R]) -> R:
    """Run a stage as a task of its run, with its metrics and with its progress in the workdir; a stage that is no run's
    task, as it is.
    """
    run = _run_of(config)
    if not run or os.environ.get("RANK", "0") != "0":  # of several ranks, one speaks
        return stage(config)
    board = tasks.Board(config.workdir, run[0])
    with metrics.offered(config.stage, config.task()):
        tasks.refuse_again(board, config.task())
        config.admit()
        with tasks.reported(board, config.task(), config.stage, config.on_device, run[1]):
            return stage(config)


def _run_of(config: StageConfig) -> tuple[str, float] | None:
    """Return the name of the run that a config is of, and its budget; None where there is no plan to tell."""
    name = getattr(config, "name", None)
    if name is not None:
        return name, 0.0
    try:
        plan = json.loads(storage.read(getattr(config, "plan", "")))
        return plan["name"], plan["run"].get("budget_hours", 0.0)
    except (OSError, SemiscaleError, LookupError, TypeError, ValueError):
        return None  # the stage itself says what is wrong with its inputs


def _plain(argument: Any) -> Any:
    if argument is None:  # an optional artifact that was not given
        return ""
    if isinstance(argument, list):
        return [_plain(item) for item in argument]
    return getattr(argument, "path", argument)


def guarded(run: Callable[[], None]) -> int:
    """Run a stage or a verb; returns its exit code, after one line on standard error where that is not 0."""
    try:
        run()
    except ValidationError as error:
        fail(f"refused: {describe(error, ())}", Refused.exit_code)
        return Refused.exit_code
    except SemiscaleError as error:
        fail(f"{'refused' if isinstance(error, Refused) else 'failed'}: {error}", error.exit_code)
        return error.exit_code
    except OSError as error:
        missing = ": no such file" if isinstance(error, FileNotFoundError) and not error.errno else ""  # a store's own
        fail(f"failed: {error}{missing}; what was finished is kept, run it again to go on", SemiscaleError.exit_code)
        return SemiscaleError.exit_code
    return 0
