"""Test the evaluation: choice of models, equal images and stored predictions."""

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

# The verb `measure` compiles no pipeline.
NO_PIPELINE: Any = None
MODELS = ["teacher", "baseline", "pretrained", "student"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a run whose evaluation is finished."""
    stages = Stages(tmp_path_factory.mktemp("run"))
    assert stages.evaluation
    return stages


def test_a_label_among_the_top_k_is_correct() -> None:
    logits_BC = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    labels_B = torch.tensor([0, 0, 0])
    ranked_BC = logits_BC.topk(3).indices
    assert topk_correct(ranked_BC, labels_B, 1).tolist() == [True, False, False]
    assert topk_correct(ranked_BC, labels_B, 2).tolist() == [True, False, True]
    assert topk_correct(ranked_BC, labels_B, 5).tolist() == [True, True, True]


def test_the_four_models_are_evaluated_on_the_same_images(stages: Stages) -> None:
    receipt = stages.evaluation
    assert list(receipt.models) == MODELS
    predictions = {}
    for name, model in receipt.models.items():
        predictions[name] = pq.read_table(model.predictions).to_pylist()
        assert model.images == len(predictions[name]) == 18
        assert model.top1 <= model.top5 == 1.0
        assert model.top1 == sum(row["top"][0] == row["label"] for row in predictions[name]) / 18
        assert model.top1_interval[0] <= model.top1 <= model.top1_interval[1]
        assert 0 <= model.calibration_error <= 1
        assert sum(receipt.per_class[name]) / 3 == pytest.approx(model.top1)
    identities = [[(row["key"], row["label"]) for row in rows] for rows in predictions.values()]
    assert identities == [identities[0]] * 4
    assert len(set(identities[0])) == 18
    assert sum(map(sum, receipt.confusion.counts)) == 18


def test_the_student_is_compared_with_the_other_three(stages: Stages) -> None:
    receipt = stages.evaluation
    assert [comparison.against for comparison in receipt.comparisons] == MODELS[:3]
    for comparison in receipt.comparisons:
        gain = receipt.models["student"].top1 - receipt.models[comparison.against].top1
        assert comparison.difference == pytest.approx(gain)
        assert (comparison.wins - comparison.losses) / 18 == pytest.approx(gain)


def test_all_learning_rates_that_were_tried_are_listed(stages: Stages) -> None:
    receipt = stages.evaluation
    for name, trainings in (("student", stages.students), ("baseline", stages.baselines)):
        expected = [(training.learning_rate, training.validation_top1, training.digest) for training in trainings]
        assert [
            (trial.learning_rate, trial.validation_top1, trial.receipt) for trial in receipt.tried[name]
        ] == expected
        assert receipt.chosen[name] == best_by_validation(trainings).learning_rate
        assert receipt.models[name].receipt == best_by_validation(trainings).digest


def test_of_equal_trainings_the_smallest_learning_rate_is_chosen(stages: Stages) -> None:
    training = stages.teacher
    tried = [training.model_copy(update={"learning_rate": rate, "validation_top1": 0.5}) for rate in (0.3, 0.1, 0.2)]
    assert best_by_validation(tried).learning_rate == 0.1
    better = training.model_copy(update={"learning_rate": 0.9, "validation_top1": 0.6})
    assert best_by_validation([*tried, better]).learning_rate == 0.9


def test_stored_predictions_are_those_of_the_model(stages: Stages) -> None:
    from semiscale.data.shard import SampleFields
    from semiscale.evaluation.inference import EvalLoader, predict_logits
    from semiscale.models import checkpoint_io

    student = best_by_validation(stages.students)
    stored = Predictions.from_bytes(storage.read_bytes(stages.evaluation.models["student"].predictions))
    loader = EvalLoader(stages.plan.test, SampleFields(), student.preprocessing)
    counted: list[int] = []
    network = checkpoint_io.load_model(student.checkpoint)[0]
    probability_BC = predict_logits(network, loader, torch.device("cpu"), counted.append).softmax(1)
    assert sum(counted) == 18
    assert stored.labels_B.tolist() == loader.labels_B.tolist()
    # There are three classes.
    assert stored.top_BR.tolist() == probability_BC.topk(3).indices.tolist()
    assert stored.probability_B == pytest.approx(probability_BC.max(1).values.numpy())
    assert Predictions.from_bytes(stored.to_bytes()).keys == stored.keys


def test_a_model_measured_alone_has_the_metrics_of_the_evaluation(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = stages.root / "run.yaml"
    run_file.write_text(yaml.safe_dump(stages.content))
    models = {"teacher": stages.teacher, "student": best_by_validation(stages.students)}
    for name, receipt in models.items():
        assert main(NO_PIPELINE, ["measure", str(run_file), stages.uri(receipt)]) == 0
        assert f"{receipt.recipe}, on 18 test images of 3 classes" in capsys.readouterr().out
        path = Path(stages.workdir, "trial", "measured", f"{receipt.digest}.json")
        measured = ModelEvaluation.model_validate_json(path.read_text())
        assert measured.model == stages.evaluation.models[name]
        assert measured.per_class == stages.evaluation.per_class[name]
        assert measured.per_class_intervals == stages.evaluation.per_class_intervals[name]
        assert name != "student" or measured.confusion == stages.evaluation.confusion


def test_the_component_writes_artifacts_for_the_kubeflow_ui(stages: Stages, tmp_path: Path) -> None:
    # The function of the component is called with artifacts of kfp.
    def make_artifact(kind: type[dsl.Artifact], uri: str) -> dsl.Artifact:
        return kind(name=Path(uri).stem, uri=uri)

    run = RunParameters.model_validate(stages.plan.run)
    lineage = publish(stages.plan, run, {}).lineage

    def write_receipts(*receipts: TrainReceipt) -> list[dsl.Artifact]:
        artifacts = []
        for number, training in enumerate(receipts):
            path = tmp_path / f"{training.recipe}-{number}.json"
            path.write_text(publish(training, run, lineage).model_dump_json())
            artifacts.append(make_artifact(dsl.Artifact, str(path)))
        return artifacts

    lineage = publish(stages.teacher, run, lineage).lineage
    lineage = publish(stages.pretrained, run, lineage).lineage
    receipt = make_artifact(dsl.Artifact, str(tmp_path / "receipt"))
    metrics = dsl.Metrics(name="metrics", uri=str(tmp_path / "metrics"))
    confusion = dsl.ClassificationMetrics(name="confusion", uri=str(tmp_path / "confusion"))
    summary = make_artifact(dsl.Markdown, str(tmp_path / "summary.md"))
    component.python_func(
        receipt=receipt, metrics=metrics, confusion=confusion, summary=summary,
        baselines=write_receipts(*stages.baselines), students=write_receipts(*stages.students),
    )  # fmt: skip
    evaluation = EvaluationReceipt.model_validate_json(Path(receipt.path).read_text())
    assert evaluation.model_copy(update={"lineage": {}}) == stages.evaluation
    assert metrics.metadata["student top-1 (%)"] == pytest.approx(100 * evaluation.models["student"].top1, abs=0.001)
    matrix = confusion.metadata["confusionMatrix"]
    assert [spec["displayName"] for spec in matrix["annotationSpecs"]] == ["red", "green", "blue"]
    assert [row["row"] for row in matrix["rows"]] == evaluation.confusion.counts
    assert "| student | **" in Path(summary.path).read_text()
    assert json.dumps({**metrics.metadata, **confusion.metadata}), (
        "kfp's executor must be able to write the metadata as JSON"
    )
