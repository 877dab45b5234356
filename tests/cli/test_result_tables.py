"""Test the tables of accuracies that `run` and `measure` print."""

from pathlib import Path

import pytest

from semiscale.cli.measure import format_measurement_table
from semiscale.cli.run import print_results
from semiscale.config.run_config import RunConfig
from semiscale.receipts.evaluate import ConfusionMatrix, ModelEvaluation
from tests.support import sample_images
from tests.support.reports import make_evaluation_receipt, make_train_receipt, write_report, write_run


@pytest.mark.parametrize(("classes", "has_top5"), [(5, False), (6, True)])
def test_a_measurement_has_top_5_for_more_than_five_classes_only(classes: int, has_top5: bool) -> None:
    names = [str(label) for label in range(classes)]
    measured = ModelEvaluation(
        model=make_evaluation_receipt().models["student"],
        classes=names,
        per_class=[0.5] * classes,
        per_class_intervals=[(0.4, 0.6)] * classes,
        confusion=ConfusionMatrix(classes=names, counts=[[1] * classes] * classes),
    )
    table = "\n".join(format_measurement_table(measured, make_train_receipt("finetune", 0.1, 1, 100, 0.7)))
    assert ("top-5" in table) == has_top5


def test_the_results_of_four_classes_have_no_top_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, write_run(tmp_path))
    settings = RunConfig.model_validate(
        {**sample_images.write_run(tmp_path), "name": "fruit", "workdir": str(tmp_path / "work")}
    )
    capsys.readouterr()
    print_results(settings)
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[-1] == "top-1"
    assert "71.50%" in out
    assert "91.50%" not in out
