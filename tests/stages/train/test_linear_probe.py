"""The transfer setting fc-only: a logistic regression on a frozen network's features, against scikit-learn's."""

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
from tests.support import pictures
from tests.support.stages import Stages

NO_PIPELINE: Any = None  # these verbs do not compile
CPU = torch.device("cpu")
DIGITS = {"labeled": range(20), "validation": range(20, 40), "test": range(40, 70)}  # the images of each class


def problem(images: int = 90, classes: int = 3, width: int = 6) -> tuple[Tensor, Tensor]:
    """Features far from the origin and of unlike sizes, whose classes overlap."""
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=generator)
    noise = torch.randn(images, width, generator=generator)
    return (centres[labels_B] + 1.5 * noise) * torch.arange(1, width + 1) + 40, labels_B


def reference(train: tuple[Tensor, Tensor], l2: float, biased: bool, on_BF: Tensor) -> NDArray[np.float64]:
    """Return scikit-learn's probabilities of images. Its C multiplies the sum of the losses, ours is their mean."""
    samples, labels_B = train[0].double(), train[1]
    centre = samples.mean(0) if biased else torch.zeros(samples.shape[1])
    length = (samples - centre).square().sum(1).mean().sqrt()
    regression = LogisticRegression(C=1 / (l2 * len(samples)), fit_intercept=biased, tol=1e-8, max_iter=10_000)
    regression.fit(((samples - centre) / length).numpy(), labels_B.numpy())
    return np.asarray(regression.predict_proba(((on_BF.double() - centre) / length).numpy()))


@pytest.mark.parametrize("biased", [True, False])
def test_the_path_is_scikit_learns(biased: bool) -> None:
    features_BF, labels_B = problem()
    path = list(logistic_regression.regularization_path(features_BF, labels_B, 3, biased, CPU))
    assert [one.l2 for one in path] == sorted((one.l2 for one in path), reverse=True)
    for one in path[::4]:
        expected = reference((features_BF, labels_B), one.l2, biased, features_BF)
        assert one.head.logits(features_BF).softmax(1).numpy() == pytest.approx(expected, abs=5e-3)
    assert all(one.gradient <= 1e-4 for one in path)


def test_a_set_in_parts_is_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(logistic_regression.regularization_path(*problem(), 3, True, CPU))
    monkeypatch.setattr(logistic_regression, "CHUNK_BYTES", 7 * 6 * 8)  # seven images
    for one, other in zip(whole, logistic_regression.regularization_path(*problem(), 3, True, CPU), strict=True):
        expected, found = (solved.head.logits(problem()[0]).softmax(1).numpy() for solved in (one, other))
        assert found == pytest.approx(expected, abs=5e-3)


def test_features_that_are_all_alike_end_in_the_commonest_class() -> None:
    labels_B = torch.tensor([0, 0, 0, 1])
    for features_BF in (torch.zeros(4, 2), torch.ones(4, 2)):
        for solution in logistic_regression.regularization_path(features_BF, labels_B, 2, True, CPU):
            probability_BC = solution.head.logits(features_BF).softmax(1)
            assert probability_BC[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-4)


def solution(l2: float, margin: float) -> logistic_regression.RegularizedFit:
    """A head of two classes whose logits for a feature of 1 differ by a margin; one feature an image."""
    return logistic_regression.RegularizedFit(
        l2, logistic_regression.LinearHead(torch.tensor([[0.0], [margin]]).double(), torch.zeros(2).double()), 1, 0
    )


def test_of_equal_top1_the_lower_loss_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    features_BF, labels_B = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([1, 1, 0])
    path = [solution(1.0, -1.0), solution(0.1, 2.0), solution(0.01, 5.0), solution(0.001, 3.0)]
    best, fitted = linear_probe.select_by_validation(path, features_BF, labels_B)
    assert best is path[2]
    assert [one.validation_top1 for one in fitted] == [0, 1, 1, 1]
    assert "validation top-1 1.0000 at L2 1.0e-02, of 4\n" in capsys.readouterr().out
    linear_probe.select_by_validation(path[:3], features_BF, labels_B)
    assert "of 3, at an end of what was tried" in capsys.readouterr().out


def test_a_network_without_one_linear_head_is_refused() -> None:
    model = networks.build_model("squeezenet1_0", 2, 224)
    with pytest.raises(InvalidInputError, match="SEMI-E144"):
        networks.linear_head_name(model, "squeezenet1_0", 224)


def write_digits(root: Path) -> dict[str, str]:
    """Write three of scikit-learn's scanned digits, which the teacher has never seen, as class folders."""
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
    """A run of three colours whose teacher is trained."""
    stages = Stages(tmp_path_factory.mktemp("run"))
    assert stages.teacher
    return stages


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digits' folders."""
    return write_digits(tmp_path_factory.mktemp("digits"))


def run_file(root: Path, digits: dict[str, str], **changes: Any) -> Path:
    """Write a run file of the digits."""
    root.mkdir(exist_ok=True)
    content = pictures.write_run(root, classes="", unlabeled=[], **digits, **changes)
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    return root / "run.yaml"


def receipt_of(root: Path) -> tuple[TrainReceipt, ModelEvaluation]:
    """Return what the one transfer of a workdir left."""
    (kept,) = (root / "work" / "trial" / "measured").iterdir()
    measured = ModelEvaluation.model_validate_json(kept.read_text())
    return load_document(measured.model.training, TrainReceipt), measured


def features(checkpoint: str, run: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return what enters a network's last layer, caught on its way, image by image."""
    model, description = checkpoint_io.load_model(checkpoint)
    caught: list[Tensor] = []
    assert isinstance(model.fc, nn.Module)
    model.fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
    plan = ensure_plan(run_config.load_run_config(run).with_absolute_uris())
    prepared = EvalLoader(getattr(plan, split), SampleFields(), description.preprocessing)
    model.eval()
    for batch in prepared.batches():
        for image in batch:
            model(normalization.to_normalized_batch(image[None], description.preprocessing, CPU))
    return torch.cat(caught), prepared.labels_B


def test_a_new_head_on_a_network_that_stays_as_it_is(
    teacher: Stages, digits: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = run_file(tmp_path, digits), teacher.teacher.checkpoint
    command = ["transfer", str(run), source, "--setting=fc-only"]
    assert main(NO_PIPELINE, command) == 0
    said = capsys.readouterr().out
    assert "resnet8_small, fc-only, on 90 test images of 3 classes" in said
    receipt, measured = receipt_of(tmp_path)
    assert (receipt.recipe, receipt.classes) == ("fc-only", ["digit-3", "digit-5", "digit-8"])
    assert (receipt.samples, receipt.images_processed, receipt.curve) == (60, 0, [])
    assert receipt.source.startswith(source)
    assert measured.model.top1 > 0.6

    before, after = (checkpoint_io.load_model(uri)[0].state_dict() for uri in (source, receipt.checkpoint))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}, "running statistics stay as well"

    assert [one.l2 for one in receipt.fitted] == list(logistic_regression.L2_STRENGTHS)
    best = min(receipt.fitted, key=lambda one: (-one.validation_top1, one.validation_loss))
    assert (receipt.l2, receipt.validation_top1) == (best.l2, best.validation_top1)
    train = features(source, run, "train")
    for split in ("validation", "test"):
        features_BF, labels_B = features(receipt.checkpoint, run, split)
        logits_BC = nn.functional.linear(features_BF, after["fc.weight"], after["fc.bias"])
        expected = reference(train, receipt.l2, True, features_BF)
        assert logits_BC.softmax(1).numpy() == pytest.approx(expected, abs=0.01)
        top1 = receipt.validation_top1 if split == "validation" else measured.model.top1
        assert float((logits_BC.argmax(1) == labels_B).double().mean()) == pytest.approx(top1)

    assert main(NO_PIPELINE, command) == 0
    assert f"finished before: {receipt.folder}" in capsys.readouterr().out
    assert main(NO_PIPELINE, ["measure", str(run), receipt.checkpoint]) == 0
    assert capsys.readouterr().out.partition("\n\n")[2] == said.partition("\n\n")[2]
    with contextlib.chdir(receipt.folder):  # named from where one stands, it is exported to where it lies
        assert main(NO_PIPELINE, ["export", "model.safetensors", "--format=torch"]) == 0
    assert Path(receipt.folder, "model.pt2").exists()


class EndedHereError(BaseException):
    """Nothing that the fitting would handle."""


def test_ended_before_its_receipt_and_run_again(
    teacher: Stages, digits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint_io.save_model

    def save_and_end(*given: Any) -> None:
        save(*given)
        raise EndedHereError

    weights, receipts = teacher.teacher.checkpoint, []
    for name in ("undisturbed", "ended"):
        settings = run_config.load_run_config(run_file(tmp_path / name, digits)).with_absolute_uris()
        config = linear_probe_config(settings, teacher.uri(ensure_plan(settings)), weights)
        if name == "ended":
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint_io, "save_model", save_and_end)
                with pytest.raises(EndedHereError):
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
def test_what_fc_only_does_not_take_is_refused(
    option: str,
    changes: dict[str, Any],
    line: str,
    digits: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_file(tmp_path, digits, **changes)
    assert main(NO_PIPELINE, ["transfer", str(run), "model.safetensors", "--setting=fc-only", option]) == 2
    assert re.match(f"refused: {line}", capsys.readouterr().err)
    assert not (tmp_path / "work" / "stages").exists()
