"""How a stage of a run finds its parameters and the receipts of earlier stages.

A task of the pipeline is given the receipts of the tasks right before it. Each names the run's earlier receipts in its
`lineage`, so the graph has no other edges. The plan's receipt, which is always among them, holds the run's parameters.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config.form import from_form
from semiscale.config.run_parameters import RunParameters
from semiscale.receipts.base import Receipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import ScoreReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.run_once import R
from semiscale.runtime.stage_config import StageConfig, is_receipt_field
from semiscale.storage.documents import load_document

Lineage = dict[str, list[str]]
_ROLE_BY_STAGE = {
    "plan": "plan",
    "score": "scores",
    "merge": "selection",
    "pack": "packed",
    "evaluate": "evaluation",
    "promote": "promotion",
}
_ROLE_BY_RECIPE = {"teacher": "teacher", "pretrain": "pretrained", "finetune": "students"}


class TaskInputs(NamedTuple):
    """The inputs of one task of a pipeline: the stage's config, the run's parameters, and the receipts so far."""

    config: StageConfig
    run: RunParameters
    lineage: Lineage


def resolve_inputs(config_type: type[StageConfig], arguments: Mapping[str, Any]) -> TaskInputs:
    """Return the inputs of a task from the arguments of its component.

    Args:
        config_type: The config of the stage. The plan's config has the run's parameters as its own fields.
        arguments: The form's arguments for the plan. For any other stage, the receipts right before it by the names of
            the config's fields, and what else tells the task from others: a pod's number, a role, a learning rate.
    """
    if issubclass(config_type, RunParameters):
        config = config_type.model_validate(from_form(arguments))
        return TaskInputs(config, config, {})
    # An optional artifact that the task is not given stands as an empty string.
    given = {name: value for name, value in arguments.items() if value not in ("", [])}
    receipts = [
        uri
        for name, field in config_type.model_fields.items()
        if is_receipt_field(field) and name in given
        for uri in _as_list(given[name])
    ]
    lineage = read_lineage(receipts)
    run = load_run_parameters(lineage)
    return TaskInputs(config_type.from_run(run, {**find_receipts(config_type, lineage), **given}), run, lineage)


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def read_lineage(receipts: list[str]) -> Lineage:
    """Return the joined lineages of the receipts at some URIs, by role, each URI once and in order.

    Raises:
        InvalidInputError: A receipt is missing, or was not made by a task of a pipeline.
    """
    joined: Lineage = {}
    for uri in receipts:
        data = storage.read_or_none(uri)
        if data is None:
            raise InvalidInputError("SEMI-E010", f"{uri}: there is no receipt. Run the stage that writes it first.")
        for role, uris in json.loads(data).get("lineage", {}).items():
            known = joined.setdefault(role, [])
            known.extend(earlier for earlier in uris if earlier not in known)
    if "plan" not in joined:
        raise InvalidInputError(
            "SEMI-E011", f"{', '.join(receipts)}: names no plan. Start the run again, from its first task."
        )
    return joined


def load_run_parameters(lineage: Lineage) -> RunParameters:
    """Return the parameters of the run that a lineage belongs to."""
    return RunParameters.model_validate(load_document(lineage["plan"][0], PlanReceipt).run)


def find_receipts(config_type: type[StageConfig], lineage: Lineage) -> dict[str, Any]:
    """Return the receipts that a stage requires, by the names of its config's fields, where the lineage has them."""
    receipts: dict[str, Any] = {}
    for name, field in config_type.model_fields.items():
        if is_receipt_field(field) and field.is_required() and name in lineage:
            receipts[name] = lineage[name] if field.annotation == list[str] else lineage[name][0]
    return receipts


def publish(receipt: R, run: RunParameters, lineage: Lineage) -> R:
    """Add a receipt to its run: return it with its lineage, and write it under the run's name for later tasks.

    The receipt of a count or of a report is not written, because no later task looks for it by its role.
    """
    if isinstance(receipt, PlanReceipt):
        # Finished work may be found under another name of the same workdir.
        receipt = receipt.model_copy(update={"run": {**receipt.run, "workdir": run.workdir}})
    role = _role_of(receipt)
    if not role:
        return receipt.model_copy(update={"lineage": lineage})
    number = _number_of(receipt, run)
    name = f"{role}.json" if number is None else f"{role}-{number:03}.json"
    uri = storage.join(run.workdir, run.name, "tasks", name)
    published = receipt.model_copy(update={"lineage": {**lineage, role: [uri]}})
    storage.write_bytes(uri, published.model_dump_json(indent=1).encode())
    return published


def _role_of(receipt: Receipt) -> str:
    if isinstance(receipt, TrainReceipt):
        return _ROLE_BY_RECIPE.get(receipt.recipe, "baselines")
    return _ROLE_BY_STAGE.get(receipt.stage, "")


def _number_of(receipt: Receipt, run: RunParameters) -> int | None:
    """Return a pod's number, or the place of a learning rate in its sweep; None for a task that is alone."""
    if isinstance(receipt, ScoreReceipt):
        return receipt.pod
    if isinstance(receipt, TrainReceipt) and (role := _role_of(receipt)) in ("baselines", "students"):
        rates = run.baseline_learning_rates if role == "baselines" else run.finetune_learning_rates
        # Kubeflow hands numbers through JSON and protobuf: the nearest rate is the one.
        return min(range(len(rates)), key=lambda place: abs(rates[place] - receipt.learning_rate))
    return None
