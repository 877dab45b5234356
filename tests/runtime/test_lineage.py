"""Test that a task finds parameters and receipts through its input receipts."""

from pathlib import Path
from typing import Any

import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.config.form import to_form
from semiscale.config.run_parameters import RunParameters
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.lineage import publish, read_lineage, resolve_inputs
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.stages.plan.stage import PlanConfig
from semiscale.stages.report.stage import ReportConfig
from semiscale.stages.train.config import TrainConfig
from semiscale.storage.documents import load_document
from tests.support.stages import Stages


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"))


def run_parameters(stages: Stages) -> RunParameters:
    """Return the run's parameters, with two learning rates for the fine-tuning."""
    return RunParameters.model_validate({**stages.plan.run, "finetune_learning_rates": [0.5, 0.25]})


def write_receipt(folder: Path, name: str, receipt: Any) -> str:
    """Write a receipt to a local path, as kfp copies an artifact, and return the path."""
    path = folder / name
    path.write_text(receipt.model_dump_json())
    return str(path)


def test_the_plan_gets_the_parameters_of_the_form(stages: Stages) -> None:
    run = run_parameters(stages)
    config, parameters, lineage = resolve_inputs(PlanConfig, to_form(run))
    assert config.model_dump() == parameters.model_dump() == run.model_dump()
    assert lineage == {}


def test_receipts_of_a_run_are_found_through_the_last_one(tmp_path: Path, stages: Stages) -> None:
    run = run_parameters(stages).model_copy(update={"workdir": str(tmp_path / "work")})
    plan = publish(stages.plan.model_copy(update={"run": run.model_dump()}), run, {})
    teacher = publish(stages.teacher, run, read_lineage([write_receipt(tmp_path, "plan", plan)]))
    before = read_lineage([write_receipt(tmp_path, "teacher", teacher)])
    pretrained = publish(stages.teacher.model_copy(update={"recipe": "pretrain"}), run, before)
    trained = read_lineage([write_receipt(tmp_path, "pretrained", pretrained)])
    students = [
        publish(stages.teacher.model_copy(update={"recipe": "finetune", "learning_rate": rate}), run, trained)
        for rate in run.finetune_learning_rates
    ]
    baseline = publish(
        stages.teacher.model_copy(update={"recipe": "baseline", "learning_rate": run.baseline_learning_rates[0]}),
        run,
        read_lineage([write_receipt(tmp_path, "plan", plan)]),
    )
    inputs = {
        "students": [write_receipt(tmp_path, f"student-{number}", student) for number, student in enumerate(students)],
        "baselines": [write_receipt(tmp_path, "baseline", baseline)],
    }
    config = resolve_inputs(EvaluateConfig, inputs).config
    assert isinstance(config, EvaluateConfig)
    assert config.workdir == run.workdir
    assert load_document(config.plan, PlanReceipt).name == run.name
    assert load_document(config.teacher, TrainReceipt).digest == stages.teacher.digest
    assert load_document(config.pretrained, TrainReceipt).recipe == "pretrain"
    assert config.students == inputs["students"]
    lineage = resolve_inputs(EvaluateConfig, inputs).lineage
    assert [load_document(uri, TrainReceipt).learning_rate for uri in lineage["students"]] == [0.5, 0.25]
    assert [uri.rpartition("/")[2] for uri in lineage["students"]] == ["students-000.json", "students-001.json"]


def test_a_reused_plan_names_the_workdir_of_this_run(tmp_path: Path, stages: Stages) -> None:
    run = run_parameters(stages).model_copy(update={"workdir": str(tmp_path)})
    published = publish(stages.plan, run, {})
    assert published.run["workdir"] == str(tmp_path)
    assert load_document(published.lineage["plan"][0], PlanReceipt) == published


def test_a_training_gets_only_its_own_receipts(tmp_path: Path, stages: Stages) -> None:
    """The fine-tuning does not take the packed set, although its lineage has it."""
    run = run_parameters(stages).model_copy(update={"workdir": str(tmp_path / "work")})
    plan = publish(stages.plan.model_copy(update={"run": run.model_dump()}), run, {})
    lineage = {**plan.lineage, "packed": ["somewhere"]}
    start = write_receipt(tmp_path, "start", stages.teacher.model_copy(update={"lineage": lineage}))
    arguments = {"role": "finetune", "start": start, "learning_rate": 0.5, "plan": "", "packed": ""}
    config = resolve_inputs(TrainConfig, arguments).config
    assert isinstance(config, TrainConfig)
    assert (config.start, config.packed, config.plan) == (start, "", plan.lineage["plan"][0])


@pytest.mark.parametrize(("content", "code"), [(None, "SEMI-E010"), (b'{"digest": "0"}', "SEMI-E011")])
def test_a_receipt_of_no_run_is_refused(tmp_path: Path, content: bytes | None, code: str) -> None:
    uri = str(tmp_path / "receipt.json")
    if content:
        storage.write_bytes(uri, content)
    with pytest.raises(InvalidInputError) as error:
        resolve_inputs(ReportConfig, {"promotion": uri})
    assert error.value.code == code
