"""Test the transfer setting fc-only.

It is a logistic regression on the features of a frozen network. Its solutions are compared with those of scikit-learn.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from semiscale import storage
from semiscale.cli.demo_images import encode_png
from semiscale.cli.main import main
from semiscale.cli.measure import ensure_plan
from semiscale.cli.transfer import linear_probe_config
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.data.shard import SampleFields
from semiscale.evaluation.inference import EvalLoader
from semiscale.models import checkpoint_io, networks, normalization
from semiscale.receipts.evaluate import ModelEvaluation
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.train import linear_probe, logistic_regression
from semiscale.stages.train.stage import fit_linear_probe
from semiscale.storage.documents import load_document
from tests.support import sample_images
from tests.support.stages import Stages

# These verbs do not compile a pipeline.
NO_PIPELINE: Any = None
CPU = torch.device("cpu")
# The images of each class.
DIGITS = {"labeled": range(20), "validation": range(20, 40), "test": range(40, 70)}


def draw_features(images: int = 90, classes: int = 3, width: int = 6) -> tuple[Tensor, Tensor]:
    """Return features and labels of overlapping classes.

    The features are far from the origin and have different scales.
    """
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=generator)
    noise = torch.randn(images, width, generator=generator)
    return (centres[labels_B] + 1.5 * noise) * torch.arange(1, width + 1) + 40, labels_B


def predict_with_scikit_learn(
    train: tuple[Tensor, Tensor], l2: float, has_bias: bool, features_BF: Tensor
) -> NDArray[np.float64]:
    """Return the probabilities of images by scikit-learn.

    Its C multiplies the sum of the losses, so C is 1 / (l2 * images) for the mean of the losses.
    """
    samples, labels_B = train[0].double(), train[1]
    centre = samples.mean(0) if has_bias else torch.zeros(samples.shape[1])
    length = (samples - centre).square().sum(1).mean().sqrt()
    regression = LogisticRegression(C=1 / (l2 * len(samples)), fit_intercept=has_bias, tol=1e-8, max_iter=10_000)
    regression.fit(((samples - centre) / length).numpy(), labels_B.numpy())
    return np.asarray(regression.predict_proba(((features_BF.double() - centre) / length).numpy()))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_solutions_of_the_path_are_those_of_scikit_learn(has_bias: bool) -> None:
    features_BF, labels_B = draw_features()
    path = list(logistic_regression.regularization_path(features_BF, labels_B, 3, has_bias, CPU))
    strengths = [fit.l2 for fit in path]
    assert strengths == sorted(strengths, reverse=True)
    for fit in path[::4]:
        expected = predict_with_scikit_learn((features_BF, labels_B), fit.l2, has_bias, features_BF)
        assert fit.head.logits(features_BF).softmax(1).numpy() == pytest.approx(expected, abs=5e-3)
    assert all(fit.gradient <= 1e-4 for fit in path)


def test_the_solution_does_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(logistic_regression.regularization_path(*draw_features(), 3, True, CPU))
    # A chunk has seven images.
    monkeypatch.setattr(logistic_regression, "CHUNK_BYTES", 7 * 6 * 8)
    chunked = logistic_regression.regularization_path(*draw_features(), 3, True, CPU)
    for fits in zip(whole, chunked, strict=True):
        expected, probabilities = (fit.head.logits(draw_features()[0]).softmax(1).numpy() for fit in fits)
        assert probabilities == pytest.approx(expected, abs=5e-3)


def test_equal_features_give_the_frequencies_of_the_classes() -> None:
    labels_B = torch.tensor([0, 0, 0, 1])
    for features_BF in (torch.zeros(4, 2), torch.ones(4, 2)):
        for fit in logistic_regression.regularization_path(features_BF, labels_B, 2, True, CPU):
            probability_BC = fit.head.logits(features_BF).softmax(1)
            assert probability_BC[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-4)


def build_fit(l2: float, margin: float) -> logistic_regression.RegularizedFit:
    """Return a head of one feature and two classes.

    The logits of a feature of 1 differ by the margin.
    """
    return logistic_regression.RegularizedFit(
        l2, logistic_regression.LinearHead(torch.tensor([[0.0], [margin]]).double(), torch.zeros(2).double()), 1, 0
    )


def test_the_lower_loss_is_chosen_if_top1_is_equal(capsys: pytest.CaptureFixture[str]) -> None:
    features_BF, labels_B = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([1, 1, 0])
    path = [build_fit(1.0, -1.0), build_fit(0.1, 2.0), build_fit(0.01, 5.0), build_fit(0.001, 3.0)]
    best, trials = linear_probe.select_by_validation(path, features_BF, labels_B)
    assert best is path[2]
    assert [trial.validation_top1 for trial in trials] == [0, 1, 1, 1]
    assert "validation top-1 1.0000 at L2 1.0e-02, of 4\n" in capsys.readouterr().out
    linear_probe.select_by_validation(path[:3], features_BF, labels_B)
    assert "of 3, at an end of what was tried" in capsys.readouterr().out


def test_a_network_without_one_linear_head_is_refused() -> None:
    model = networks.build_model("squeezenet1_0", 2, 224)
    with pytest.raises(InvalidInputError, match="SEMI-E144"):
        networks.linear_head_name(model, "squeezenet1_0", 224)


def write_digits(root: Path) -> dict[str, str]:
    """Write class folders of three digits, which the teacher has never seen."""
    digits = load_digits()
    for name, numbers in DIGITS.items():
        for digit in (3, 5, 8):
            images = digits.images[digits.target == digit]
            folder = root / name / f"digit-{digit}"
            folder.mkdir(parents=True)
            for number in numbers:
                pixels = (images[number] * (255 / 16)).astype(np.uint8)
                (folder / f"{number}.png").write_bytes(encode_png(pixels))
    return {name: str(root / name) for name in DIGITS}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Run a training of a teacher on three colours."""
    stages = Stages(tmp_path_factory.mktemp("run"))
    assert stages.teacher
    return stages


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write the folders of the digits."""
    return write_digits(tmp_path_factory.mktemp("digits"))


def write_run_file(root: Path, digits: dict[str, str], **changes: Any) -> Path:
    """Write a run file of the digits."""
    root.mkdir(exist_ok=True)
    content = sample_images.write_run(root, classes="", unlabeled=[], **digits, **changes)
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return root / "run.yaml"


def read_results(root: Path) -> tuple[TrainReceipt, ModelEvaluation]:
    """Return the receipt and the evaluation of the only transfer in a workdir."""
    (path,) = (root / "work" / "trial" / "measured").iterdir()
    measured = ModelEvaluation.model_validate_json(path.read_text())
    return load_document(measured.model.training, TrainReceipt), measured


def compute_features(checkpoint: str, run: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the input of a network's last layer, image by image, and the labels."""
    model, description = checkpoint_io.load_model(checkpoint)
    head_inputs: list[Tensor] = []
    assert isinstance(model.fc, nn.Module)
    model.fc.register_forward_pre_hook(lambda _, arguments: head_inputs.append(arguments[0].detach()))
    plan = ensure_plan(run_config.load_run_config(run).with_absolute_uris())
    loader = EvalLoader(getattr(plan, split), SampleFields(), description.preprocessing)
    model.eval()
    for batch in loader.batches():
        for image in batch:
            model(normalization.to_normalized_batch(image[None], description.preprocessing, CPU))
    return torch.cat(head_inputs), loader.labels_B


def test_transfer_fits_a_new_head_on_a_frozen_network(
    teacher: Stages, digits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = write_run_file(tmp_path, digits), teacher.teacher.checkpoint
    command = ["transfer", str(run), source, "--setting=fc-only"]
    assert main(NO_PIPELINE, command) == 0
    output = capsys.readouterr().out
    assert "resnet8_small, fc-only, on 90 test images of 3 classes" in output
    receipt, measured = read_results(tmp_path)
    assert (receipt.recipe, receipt.classes) == ("fc-only", ["digit-3", "digit-5", "digit-8"])
    assert (receipt.samples, receipt.images_processed, receipt.curve) == (60, 0, [])
    assert receipt.source.startswith(source)
    assert measured.model.top1 > 0.6

    before, after = (checkpoint_io.load_model(uri)[0].state_dict() for uri in (source, receipt.checkpoint))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}, "running statistics stay as well"

    assert [trial.l2 for trial in receipt.fitted] == list(logistic_regression.L2_STRENGTHS)
    best = min(receipt.fitted, key=lambda trial: (-trial.validation_top1, trial.validation_loss))
    assert (receipt.l2, receipt.validation_top1) == (best.l2, best.validation_top1)
    train = compute_features(source, run, "train")
    for split in ("validation", "test"):
        features_BF, labels_B = compute_features(receipt.checkpoint, run, split)
        logits_BC = nn.functional.linear(features_BF, after["fc.weight"], after["fc.bias"])
        expected = predict_with_scikit_learn(train, receipt.l2, True, features_BF)
        assert logits_BC.softmax(1).numpy() == pytest.approx(expected, abs=0.01)
        top1 = receipt.validation_top1 if split == "validation" else measured.model.top1
        assert float((logits_BC.argmax(1) == labels_B).double().mean()) == pytest.approx(top1)

    assert main(NO_PIPELINE, command) == 0
    assert f"finished before: {receipt.folder}" in capsys.readouterr().out
    assert main(NO_PIPELINE, ["measure", str(run), receipt.checkpoint]) == 0
    assert capsys.readouterr().out.partition("\n\n")[2] == output.partition("\n\n")[2]
    # The model is exported to its own folder, although the path is relative to the current one.
    with contextlib.chdir(receipt.folder):
        assert main(NO_PIPELINE, ["export", "model.safetensors", "--format=torch"]) == 0
    assert Path(receipt.folder, "model.pt2").exists()


class InterruptionError(BaseException):
    """An interruption that no handler of the program catches."""


def test_an_interrupted_probe_gives_the_same_result_when_it_is_run_again(
    teacher: Stages, digits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint_io.save_model

    def save_and_interrupt(*args: Any) -> None:
        save(*args)
        raise InterruptionError

    weights, receipts = teacher.teacher.checkpoint, []
    for name in ("undisturbed", "interrupted"):
        settings = run_config.load_run_config(write_run_file(tmp_path / name, digits)).with_absolute_uris()
        config = linear_probe_config(settings, teacher.uri(ensure_plan(settings)), weights)
        if name == "interrupted":
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint_io, "save_model", save_and_interrupt)
                with pytest.raises(InterruptionError):
                    fit_linear_probe(config)
            assert storage.head(storage.join(config.folder(), "model.safetensors"))
            assert not storage.head(storage.join(config.folder(), "receipt.json"))
        receipts.append(fit_linear_probe(config))
    assert storage.read_bytes(receipts[0].checkpoint) == storage.read_bytes(receipts[1].checkpoint), "to the bit"
    assert receipts[0].fitted == receipts[1].fitted


@pytest.mark.parametrize(
    ("option", "changes", "line"),
    [
        ("--epochs=5", {}, "--epochs: .*SEMI-E428"),
        ("--learning-rate=0.1", {}, "--learning-rate: .*SEMI-E428"),
        ("--setting=fc-only", {"frames": 8}, "frames: .*SEMI-E429"),
    ],
)
def test_options_that_fc_only_does_not_have_are_refused(
    option: str,
    changes: dict[str, Any],
    line: str,
    digits: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run_file(tmp_path, digits, **changes)
    assert main(NO_PIPELINE, ["transfer", str(run), "model.safetensors", "--setting=fc-only", option]) == 2
    assert re.match(f"refused: {line}", capsys.readouterr().err)
    assert not (tmp_path / "work" / "stages").exists()
