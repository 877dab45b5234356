"""Test the verb `transfer` to other classes (Table 13), and the verb `measure`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from semiscale.cli.main import main
from semiscale.cli.measure import ensure_plan
from semiscale.cli.transfer import finetune_config
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.receipts.evaluate import ModelEvaluation
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.plan.stage import PlanConfig, plan
from semiscale.stages.train.stage import train
from semiscale.storage.documents import load_document
from tests.support import sample_images
from tests.support.stages import Stages

# The verbs do not compile the graph.
NO_PIPELINE: Any = None

# The bright channels of each class.
CLASSES = {"cyan": (1, 2), "magenta": (0, 2)}


def write_folders(root: Path, per_class: int, seed: int) -> str:
    """Write class folders of two classes that the teacher does not have."""
    for name, channels in CLASSES.items():
        for number in range(per_class):
            pixels = np.random.default_rng([seed, number]).integers(0, 120, (8, 8, 3), np.uint8)
            pixels[..., channels] += 110
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
    return str(root)


def write_run_file(root: Path, content: dict[str, Any]) -> str:
    """Write a run file."""
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a run of three classes with a trained teacher."""
    stages = Stages(tmp_path_factory.mktemp("run"))
    assert stages.teacher
    return stages


@pytest.fixture
def other(tmp_path: Path) -> dict[str, Any]:
    """Return the content of a run file of two other classes, without a pool."""
    sets = {
        name: [write_folders(tmp_path / name, count, seed)]
        for seed, (name, count) in enumerate({"labeled": 4, "validation": 4, "test": 3}.items())
    }
    content = sample_images.write_run(tmp_path, **sets, classes="", unlabeled=[])
    return {**content, "batch_size": 8, "device_batch_size": -1, "weight_decay": -1}


def test_a_trained_model_is_transferred_to_another_class_set_and_measured_there(
    teacher: Stages, other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is new, and the other layers start from the trained weights.

    With eight images, the 300 epochs of Table 13 are four of its steps. The test makes smaller and more steps.
    """
    command = ["transfer", write_run_file(tmp_path, other), teacher.uri(teacher.teacher), "--learning-rate=0.5"]
    assert main(NO_PIPELINE, [*command, "--epochs=40"]) == 0
    printed = capsys.readouterr().out
    assert "all but the head, which is new, for 2 classes" in printed
    assert "resnet8_small, transfer, on 6 test images of 2 classes" in printed
    (path,) = (tmp_path / "work" / "trial" / "measured").iterdir()
    measured = ModelEvaluation.model_validate_json(path.read_text())
    receipt = load_document(measured.model.training, TrainReceipt)
    assert (receipt.recipe, receipt.classes, measured.classes) == ("transfer", ["cyan", "magenta"], receipt.classes)
    assert receipt.source.startswith(teacher.teacher.checkpoint)
    assert (receipt.images_processed, receipt.learning_rate) == (320, 0.5)
    assert measured.model.images == 6
    assert measured.model.top1 > 0.9
    assert sum(measured.per_class) / 2 == pytest.approx(measured.model.top1), "as many images of each"
    measure = ["measure", write_run_file(tmp_path, other), receipt.checkpoint]
    assert main(NO_PIPELINE, measure) == 0
    assert capsys.readouterr().out.partition("\n\n")[2] == printed.partition("\n\n")[2]
    assert main(NO_PIPELINE, ["measure", write_run_file(tmp_path, teacher.content), receipt.checkpoint]) == 2
    assert "SEMI-E138" in capsys.readouterr().err


def test_default_settings_are_those_of_table_13(teacher: Stages, other: dict[str, Any], tmp_path: Path) -> None:
    settings = run_config.validate_run_config({**other, "batch_size": -1}, "here")
    plan = teacher.uri(ensure_plan(settings))
    from_paper = finetune_config(settings, plan, teacher.teacher.checkpoint, {})
    assert (from_paper.learning_rate, from_paper.batch_size, from_paper.weight_decay, from_paper.epochs) == (
        0.0025,
        768,
        0.001,
        300,
    )
    assert from_paper.start_weights == teacher.teacher.checkpoint
    with_start = from_paper.model_copy(update={"start": teacher.uri(teacher.teacher), "start_weights": ""})
    with pytest.raises(InvalidInputError, match="resnet8_small of 3 classes.*start_weights.*SEMI-E244"):
        train(with_start)


@pytest.mark.parametrize(
    ("option", "line"), [("--epochs=-6", "epochs: The value -6"), ("--learning-rate=0", "learning_rate: The value 0")]
)
def test_a_training_without_a_length_or_a_rate_is_refused(
    option: str, line: str, teacher: Stages, other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["transfer", write_run_file(tmp_path, other), teacher.uri(teacher.teacher), option]
    assert main(NO_PIPELINE, command) == 2
    assert f"refused: {line}" in capsys.readouterr().err
    assert not (tmp_path / "work" / "stages" / "train").exists()


@pytest.mark.parametrize("verb", ["plan", "transfer", "measure"])
def test_only_a_verb_that_selects_needs_a_pool(
    verb: str, teacher: Stages, other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A foreign model is refused before anything is trained."""
    source = [] if verb == "plan" else [str(tmp_path / "model.safetensors")]
    assert main(NO_PIPELINE, [verb, write_run_file(tmp_path, other), *source]) == 2
    line = "[SEMI-E200]" if verb == "plan" else "[SEMI-E426]"
    assert line in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match="^unlabeled: .*SEMI-E200"):
        plan(PlanConfig.model_validate(other))
