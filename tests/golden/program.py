"""The adapter between the golden tests and the program.

No other module of this package imports the program. A rename changes this file and leaves the tests and their data
alone.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from components.evaluate.evaluate import EvaluateConfig, evaluate
from components.merge.merge import MergeConfig, merge
from components.pack.pack import PackConfig, pack
from components.pack.unpacked import UnpackedConfig, count_unpacked
from components.plan import ledger
from components.plan.plan import PlanConfig, plan
from components.promote.champion import Champion
from components.promote.promote import PromoteConfig, promote
from components.report.report import ReportConfig, report
from components.score.config import ScoreConfig, UnscoredConfig
from components.score.decision import Decision
from components.score.score import score
from components.score.unscored import count_unscored
from components.shared import metrics, runfile, storage, tasks
from components.shared.checkpoints import Description
from components.shared.errors import BudgetSpent, Refused, SemiscaleError, TooManyFailures
from components.shared.progress import Progress
from components.shared.receipts import (
    EvaluationReceipt,
    Measurement,
    PackReceipt,
    PlanReceipt,
    PromotionReceipt,
    Receipt,
    ScoreReceipt,
    SelectionReceipt,
    TrainReceipt,
    UnitReceipt,
)
from components.shared.runfile import Parameters
from components.shared.shards import Shard, Unit
from components.shared.stage import StageConfig, reporting
from components.shared.stage import digest as digest_of_json
from components.shared.stopping import Stopped
from components.train.checkpoints import _Voucher
from components.train.config import HeadConfig, TrainConfig
from components.train.train import fit_head, train
from components.verbs.main import EXIT_CODES as EXIT_CODES_HELP
from components.verbs.main import main, parser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "pipeline.py", ROOT / "components"]
NO_PIPELINE: Any = None  # the verbs that the tests run do not need the graph
FINISHED_BEFORE = re.compile(r"^(\w+) · finished before: (\S+)$", re.MULTILINE)

Document = dict[str, Any]
STAGES: dict[str, tuple[type[StageConfig], Callable[[Any], Receipt]]] = {
    "plan": (PlanConfig, plan),
    "train": (TrainConfig, train),
    "fc-only": (HeadConfig, fit_head),
    "count-unscored": (UnscoredConfig, count_unscored),
    "score": (ScoreConfig, score),
    "merge": (MergeConfig, merge),
    "count-unpacked": (UnpackedConfig, count_unpacked),
    "pack": (PackConfig, pack),
    "evaluate": (EvaluateConfig, evaluate),
    "promote": (PromoteConfig, promote),
    "report": (ReportConfig, report),
}
# The types of the JSON objects in a workdir. The golden tests name them so; the classes may have other names.
DOCUMENTS: dict[str, Any] = {
    "plan receipt": PlanReceipt,
    "training receipt": TrainReceipt,
    "pod's score receipt": ScoreReceipt,
    "shard group receipt": UnitReceipt,
    "selection receipt": SelectionReceipt,
    "packing receipt": PackReceipt,
    "evaluation receipt": EvaluationReceipt,
    "promotion receipt": PromotionReceipt,
    "champion": Champion,
    "measurement": Measurement,
    "task": tasks.Task,
    "model description": Description,
    "execution decision": Decision,
    "training checkpoint": _Voucher,
    "list of shards": list[Shard],
    "list of shard groups": list[Unit],
    "run parameters": dict[str, Any],
}


def config(stage: str, fields: Document) -> Any:
    """Return the config of a stage."""
    return STAGES[stage][0].model_validate(fields)


def digest(stage: str, fields: Document) -> str:
    """Return the digest of a stage's config."""
    return str(config(stage, fields).digest())


def digest_of(*content: Any) -> str:
    """Return the digest of JSON content, as it stands in names of objects."""
    return digest_of_json(*content)


def selection_family(fields: Document) -> str:
    """Return the digest that names the selection which a run was last trained on."""
    return str(config("merge", fields).family())


def run_stage(stage: str, fields: Document) -> Document:
    """Run a stage as a task of its run, and return its receipt."""
    receipt = reporting(config(stage, fields), STAGES[stage][1])
    content: Document = json.loads(receipt.model_dump_json())
    return content


def announce(workdir: str, run: str) -> None:
    """Note in the workdir that a run was asked for, as the verb `run` does."""
    tasks.announce(workdir, run)


def parameters(run_file: Path) -> Document:
    """Return the parameters that a run file gives to the pipeline, defaults included."""
    return runfile.load(run_file).parameters()


def default_parameters() -> Document:
    """Return every run-file key with its default, "required" where it has none."""
    fields = Parameters.model_fields
    return {name: "required" if field.is_required() else field.default for name, field in fields.items()}


def round_trip(kind: str, data: bytes) -> Any:
    """Parse a JSON object with today's type, and return what that type writes."""
    adapter: TypeAdapter[Any] = TypeAdapter(DOCUMENTS[kind])
    return json.loads(adapter.dump_json(adapter.validate_json(data)))


def fields_of(kind: str) -> list[str]:
    """Return the names of the fields of a JSON object; none for a list or a plain dictionary."""
    model = DOCUMENTS[kind]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def verb(*arguments: str) -> int:
    """Run a verb, and return its exit code."""
    return main(NO_PIPELINE, list(arguments))


def verbs() -> dict[str, list[str]]:
    """Return every verb with its options and positional arguments."""
    groups = [group for group in parser(NO_PIPELINE)._actions if isinstance(group.choices, dict)]
    return {
        name: sorted(
            (*action.option_strings[:1], action.dest)[0] for action in verb_parser._actions if action.dest != "help"
        )
        for name, verb_parser in groups[0].choices.items()  # type: ignore[union-attr]
    }


def exit_codes() -> dict[str, int]:
    """Return the exit code of every kind of end that the program distinguishes."""
    kinds: dict[str, type[SemiscaleError]] = {
        "failed": SemiscaleError,
        "bad input": Refused,
        "too many unreadable samples": TooManyFailures,
        "budget spent": BudgetSpent,
        "stopped by SIGTERM": Stopped,
    }
    return {name: kind.exit_code for name, kind in kinds.items()}


def documented_exit_codes() -> list[int]:
    """Return the exit codes that --help explains."""
    return [int(code) for code in re.findall(r"^ *(\d+)  ", EXIT_CODES_HELP, re.MULTILINE)]


def offered_metrics() -> dict[str, Document]:
    """Return the name, the type and the labels of every Prometheus metric of a task that has counted something."""
    progress = Progress("score", 10)
    with progress.timed("read"):
        progress.add(1)
    return {
        sample.name: {"type": family.type, "labels": sorted(sample.labels)}
        for family in metrics.TaskMetrics("score", "score-0").collect()
        for sample in family.samples
    }


def make_small_shard_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan shard groups of a few dozen images, so that a small pool has several."""
    monkeypatch.setattr(ledger, "IMAGES_PER_UNIT", 50)


def forget_stores() -> None:
    """Open the object stores anew, because the environment that they were opened in has changed."""
    storage._open_store.cache_clear()
