"""Test the evaluation: the choice of models, equal images for all, and stored predictions."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from kfp import dsl

from components.evaluate.component import evaluate as component
from semiscale import storage
from semiscale.cli.main import main
from semiscale.config.run_parameters import RunParameters
from semiscale.evaluation.metrics import topk_correct
from semiscale.evaluation.prediction_cache import Predictions
from semiscale.receipts.evaluate import EvaluationReceipt, ModelEvaluation
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.lineage import publish
from semiscale.stages.evaluate.evaluate_models import best_by_validation
from tests.support.stages import Stages

NO_PIPELINE: Any = None  # measuring compiles nothing
MODELS = ["teacher", "baseline", "pretrained", "student"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    stages = Stages(tmp_path_factory.mktemp("run"))
    assert stages.evaluation
    return stages


def test_hits() -> None:
    logits_BC = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    labels_B = torch.tensor([0, 0, 0])
    ranked_BC = logits_BC.topk(3).indices
    assert topk_correct(ranked_BC, labels_B, 1).tolist() == [True, False, False]
    assert topk_correct(ranked_BC, labels_B, 2).tolist() == [True, False, True]
    assert topk_correct(ranked_BC, labels_B, 5).tolist() == [True, True, True]


def test_four_models_on_the_same_images(stages: Stages) -> None:
    receipt = stages.evaluation
    assert list(receipt.models) == MODELS
    kept = {}
    for name, model in receipt.models.items():
        kept[name] = pq.read_table(model.predictions).to_pylist()
        assert model.images == len(kept[name]) == 18
        assert model.top1 <= model.top5 == 1.0
        assert model.top1 == sum(row["top"][0] == row["label"] for row in kept[name]) / 18
        assert model.top1_interval[0] <= model.top1 <= model.top1_interval[1]
        assert 0 <= model.calibration_error <= 1
        assert sum(receipt.per_class[name]) / 3 == pytest.approx(model.top1)
    identities = [[(row["key"], row["label"]) for row in rows] for rows in kept.values()]
    assert identities == [identities[0]] * 4
    assert len(set(identities[0])) == 18
    assert sum(map(sum, receipt.confusion.counts)) == 18


def test_the_student_is_compared_with_the_other_three(stages: Stages) -> None:
    receipt = stages.evaluation
    assert [one.against for one in receipt.comparisons] == MODELS[:3]
    for one in receipt.comparisons:
        gain = receipt.models["student"].top1 - receipt.models[one.against].top1
        assert one.difference == pytest.approx(gain)
        assert (one.wins - one.losses) / 18 == pytest.approx(gain)


def test_all_learning_rates_that_were_tried_are_told(stages: Stages) -> None:
    receipt = stages.evaluation
    for name, trained in (("student", stages.students), ("baseline", stages.baselines)):
        expected = [(one.learning_rate, one.validation_top1, one.digest) for one in trained]
        assert [(one.learning_rate, one.validation_top1, one.receipt) for one in receipt.tried[name]] == expected
        assert receipt.chosen[name] == best_by_validation(trained).learning_rate
        assert receipt.models[name].receipt == best_by_validation(trained).digest


def test_of_equals_the_smallest_learning_rate_is_chosen(stages: Stages) -> None:
    one = stages.teacher
    tried = [one.model_copy(update={"learning_rate": rate, "validation_top1": 0.5}) for rate in (0.3, 0.1, 0.2)]
    assert best_by_validation(tried).learning_rate == 0.1
    better = one.model_copy(update={"learning_rate": 0.9, "validation_top1": 0.6})
    assert best_by_validation([*tried, better]).learning_rate == 0.9


def test_predictions_are_the_models_own_and_survive_the_file(stages: Stages) -> None:
    from semiscale.data.shard import SampleFields
    from semiscale.evaluation.inference import EvalLoader, predict_logits
    from semiscale.models import checkpoint_io

    student = best_by_validation(stages.students)
    kept = Predictions.from_bytes(storage.read_bytes(stages.evaluation.models["student"].predictions))
    prepared = EvalLoader(stages.plan.test, SampleFields(), student.preprocessing)
    counted: list[int] = []
    network = checkpoint_io.load_model(student.checkpoint)[0]
    probability_BC = predict_logits(network, prepared, torch.device("cpu"), counted.append).softmax(1)
    assert sum(counted) == 18
    assert kept.labels_B.tolist() == prepared.labels_B.tolist()
    assert kept.top_BR.tolist() == probability_BC.topk(3).indices.tolist()  # of three classes
    assert kept.probability_B == pytest.approx(probability_BC.max(1).values.numpy())
    assert Predictions.from_bytes(kept.to_bytes()).keys == kept.keys


def test_one_model_alone_is_measured_as_among_the_four(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = stages.root / "run.yaml"
    run_file.write_text(yaml.safe_dump(stages.content))
    models = {"teacher": stages.teacher, "student": best_by_validation(stages.students)}
    for name, receipt in models.items():
        assert main(NO_PIPELINE, ["measure", str(run_file), stages.uri(receipt)]) == 0
        assert f"{receipt.recipe}, on 18 test images of 3 classes" in capsys.readouterr().out
        kept = Path(stages.workdir, "trial", "measured", f"{receipt.digest}.json")
        measured = ModelEvaluation.model_validate_json(kept.read_text())
        assert measured.model == stages.evaluation.models[name]
        assert measured.per_class == stages.evaluation.per_class[name]
        assert measured.per_class_intervals == stages.evaluation.per_class_intervals[name]
        assert name != "student" or measured.confusion == stages.evaluation.confusion


def test_what_the_kubeflow_ui_is_given(stages: Stages, tmp_path: Path) -> None:
    """The component's own function, with kfp's own artifacts."""

    def artifact(kind: type[dsl.Artifact], uri: str) -> dsl.Artifact:
        return kind(name=Path(uri).stem, uri=uri)

    run = RunParameters.model_validate(stages.plan.run)
    lineage = publish(stages.plan, run, {}).lineage

    def given(*receipts: TrainReceipt) -> list[dsl.Artifact]:
        artifacts = []
        for number, one in enumerate(receipts):
            path = tmp_path / f"{one.recipe}-{number}.json"
            path.write_text(publish(one, run, lineage).model_dump_json())
            artifacts.append(artifact(dsl.Artifact, str(path)))
        return artifacts

    lineage = publish(stages.teacher, run, lineage).lineage
    lineage = publish(stages.pretrained, run, lineage).lineage
    receipt = artifact(dsl.Artifact, str(tmp_path / "receipt"))
    metrics = dsl.Metrics(name="metrics", uri=str(tmp_path / "metrics"))
    confusion = dsl.ClassificationMetrics(name="confusion", uri=str(tmp_path / "confusion"))
    summary = artifact(dsl.Markdown, str(tmp_path / "summary.md"))
    component.python_func(
        receipt=receipt, metrics=metrics, confusion=confusion, summary=summary,
        baselines=given(*stages.baselines), students=given(*stages.students),
    )  # fmt: skip
    found = EvaluationReceipt.model_validate_json(Path(receipt.path).read_text())
    assert found.model_copy(update={"lineage": {}}) == stages.evaluation
    assert metrics.metadata["student top-1 (%)"] == pytest.approx(100 * found.models["student"].top1, abs=0.001)
    matrix = confusion.metadata["confusionMatrix"]
    assert [one["displayName"] for one in matrix["annotationSpecs"]] == ["red", "green", "blue"]
    assert [one["row"] for one in matrix["rows"]] == found.confusion.counts
    assert "| student | **" in Path(summary.path).read_text()
    assert json.dumps({**metrics.metadata, **confusion.metadata}), "as kfp's executor writes them"
