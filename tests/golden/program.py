"""Adapt the program to the golden tests.

No other module of this package imports the program. A rename in the program changes only this file.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from semiscale import storage
from semiscale.cli.main import EXIT_CODES as EXIT_CODES_HELP
from semiscale.cli.main import build_parser, main
from semiscale.common.digest import content_digest as digest_of_json
from semiscale.common.errors import BudgetExceededError, InvalidInputError, SemiscaleError, TooManyBadSamplesError
from semiscale.common.signals import TerminatedError
from semiscale.config import run_config
from semiscale.config.form import from_form, to_form
from semiscale.config.run_parameters import RunParameters
from semiscale.data.shard import Shard, ShardGroup
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.execution_mode import ExecutionMode
from semiscale.observability import prometheus, task_status
from semiscale.observability.progress import Progress
from semiscale.receipts.base import Receipt
from semiscale.receipts.evaluate import EvaluationReceipt, ModelEvaluation
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.pack import PackReceipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.promote import PromotionReceipt
from semiscale.receipts.score import ScoreReceipt, ShardGroupReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.entrypoints import run_as_task
from semiscale.runtime.stage_config import StageConfig
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.stages.evaluate.stage import evaluate
from semiscale.stages.merge.stage import MergeConfig, merge
from semiscale.stages.pack.config import PackConfig, PackFanoutConfig
from semiscale.stages.pack.fanout import plan_pack_fanout
from semiscale.stages.pack.stage import pack
from semiscale.stages.plan import shard_groups
from semiscale.stages.plan.stage import PlanConfig, plan
from semiscale.stages.promote.champion import Champion
from semiscale.stages.promote.stage import PromoteConfig, promote
from semiscale.stages.report.stage import ReportConfig, report
from semiscale.stages.score.config import ScoreConfig, ScoreFanoutConfig
from semiscale.stages.score.fanout import plan_score_fanout
from semiscale.stages.score.stage import score
from semiscale.stages.train.checkpoint_manager import _CheckpointManifest
from semiscale.stages.train.config import LinearProbeConfig, TrainConfig
from semiscale.stages.train.stage import fit_linear_probe, train

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "pipeline.py", ROOT / "components", ROOT / "semiscale"]
# The verbs in the tests do not need the graph.
NO_PIPELINE: Any = None
FINISHED_BEFORE = re.compile(r"^(\w+) · finished before: (\S+)$", re.MULTILINE)

Document = dict[str, Any]
STAGES: dict[str, tuple[type[StageConfig], Callable[[Any], Receipt]]] = {
    "plan": (PlanConfig, plan),
    "train": (TrainConfig, train),
    "fc-only": (LinearProbeConfig, fit_linear_probe),
    "count-unscored": (ScoreFanoutConfig, plan_score_fanout),
    "score": (ScoreConfig, score),
    "merge": (MergeConfig, merge),
    "count-unpacked": (PackFanoutConfig, plan_pack_fanout),
    "pack": (PackConfig, pack),
    "evaluate": (EvaluateConfig, evaluate),
    "promote": (PromoteConfig, promote),
    "report": (ReportConfig, report),
}
# These are the types of the JSON objects in a workdir. The keys are the names in the golden tests, and the classes may
# have other names.
DOCUMENTS: dict[str, Any] = {
    "plan receipt": PlanReceipt,
    "training receipt": TrainReceipt,
    "pod's score receipt": ScoreReceipt,
    "shard group receipt": ShardGroupReceipt,
    "selection receipt": SelectionReceipt,
    "packing receipt": PackReceipt,
    "evaluation receipt": EvaluationReceipt,
    "promotion receipt": PromotionReceipt,
    "champion": Champion,
    "measurement": ModelEvaluation,
    "task": task_status.TaskStatus,
    "model description": CheckpointMetadata,
    "execution decision": ExecutionMode,
    "training checkpoint": _CheckpointManifest,
    "list of shards": list[Shard],
    "list of shard groups": list[ShardGroup],
    "run parameters": dict[str, Any],
}


def config(stage: str, fields: Document) -> Any:
    """Return the config of a stage."""
    return STAGES[stage][0].model_validate(fields)


def config_in_run(stage: str, run: Document, given: Document) -> Any:
    """Return the config that a task of a pipeline gives to its stage."""
    return STAGES[stage][0].from_run(RunParameters.model_validate(run), given)


def plan_through_the_form(run: Document) -> Any:
    """Return the plan's config for a run that is submitted through the form."""
    return PlanConfig.model_validate(from_form(to_form(RunParameters.model_validate(run))))


def digest(stage: str, fields: Document) -> str:
    """Return the digest of a stage's config."""
    return str(config(stage, fields).digest())


def digest_of(*content: Any) -> str:
    """Return the digest of JSON content, as it stands in names of objects."""
    return digest_of_json(*content)


def selection_family(fields: Document) -> str:
    """Return the digest that names the selection which a run was last trained on."""
    return str(config("merge", fields).lineage_digest())


def run_stage(stage: str, fields: Document) -> Document:
    """Run a stage as a task of its run, and return its receipt."""
    receipt = run_as_task(config(stage, fields), STAGES[stage][1])
    content: Document = json.loads(receipt.model_dump_json())
    return content


def announce(workdir: str, run: str) -> None:
    """Write to the workdir that a run was requested, as the verb `run` does."""
    task_status.announce_submission(workdir, run)


def parameters(run_file: Path) -> Document:
    """Return the parameters that a run file gives to the pipeline, defaults included."""
    return run_config.load_run_config(run_file).parameters()


def default_parameters() -> Document:
    """Return every run-file key with its default, or with "required"."""
    fields = RunParameters.model_fields
    return {name: "required" if field.is_required() else field.default for name, field in fields.items()}


def round_trip(kind: str, data: bytes) -> Any:
    """Parse a JSON object with its current type, and return the output of that type."""
    adapter: TypeAdapter[Any] = TypeAdapter(DOCUMENTS[kind])
    return json.loads(adapter.dump_json(adapter.validate_json(data)))


def fields_of(kind: str) -> list[str]:
    """Return the names of the fields of a JSON object.

    A list and a plain dictionary have none.
    """
    model = DOCUMENTS[kind]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def verb(*arguments: str) -> int:
    """Run a verb, and return its exit code."""
    return main(NO_PIPELINE, list(arguments))


def verbs() -> dict[str, list[str]]:
    """Return every verb with its options and positional arguments."""
    groups = [group for group in build_parser(NO_PIPELINE)._actions if isinstance(group.choices, dict)]
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
        "bad input": InvalidInputError,
        "too many unreadable samples": TooManyBadSamplesError,
        "budget spent": BudgetExceededError,
        "stopped by SIGTERM": TerminatedError,
    }
    return {name: kind.exit_code for name, kind in kinds.items()}


def documented_exit_codes() -> list[int]:
    """Return the exit codes that --help explains."""
    return [int(code) for code in re.findall(r"^ *(\d+)  ", EXIT_CODES_HELP, re.MULTILINE)]


def offered_metrics() -> dict[str, Document]:
    """Return the name, the type and the labels of every metric of a task with counts."""
    progress = Progress("score", 10)
    with progress.timer("read"):
        progress.update(1)
    return {
        sample.name: {"type": family.type, "labels": sorted(sample.labels)}
        for family in prometheus.TaskCollector("score", "score-0").collect()
        for sample in family.samples
    }


def make_small_shard_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan shard groups of a few dozen images, so that a small pool has several."""
    monkeypatch.setattr(shard_groups, "TARGET_IMAGES_PER_GROUP", 50)


def forget_stores() -> None:
    """Close the cached object stores, because the environment has changed."""
    storage._open_store.cache_clear()
