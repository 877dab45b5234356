"""Test the logits and the metadata of exported files in their own runtimes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from semiscale.cli.main import main
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data.image_decoding import decode_image
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import center_crop
from semiscale.models import checkpoint_io, networks, normalization
from semiscale.models import export as exporting
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.export import ExportMetadata, Format
from tests.support import sample_images
from tests.support.stages import Stages

# The verb does not need the graph.
NO_PIPELINE: Any = None
CLASSES = list(sample_images.CLASSES)
PREPROCESSING = Preprocessing(resolution=32, augmentation="crop-flip")

# torch's exporters and onnxscript cause these warnings themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def save_checkpoint(folder: Path, architecture: str = "resnet8_small") -> tuple[str, nn.Module]:
    """Save a network with random weights, and return its URI and the network.

    The statistics of its normalization layers come from noise.
    """
    torch.manual_seed(0)
    model = networks.build_model(architecture, len(CLASSES), PREPROCESSING.resolution)
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    metadata = CheckpointMetadata(
        architecture=architecture, classes=CLASSES, preprocessing=PREPROCESSING, recipe="teacher", digest="0"
    )
    return checkpoint_io.save_model(model, metadata, str(folder)), model.eval()


def run_exported(path: Path, images_BHWC: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    """Run an exported file without this program, and return its logits."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(torch.from_numpy(images_BHWC)).detach().numpy()
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(["logits"], {"images": images_BHWC})[0]


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("onnx", "resnet8_small"),
        ("torch", "resnet8_small"),
        pytest.param("onnx", "mobilenet_v3_small", marks=pytest.mark.slow),
        pytest.param("torch", "mobilenet_v3_small", marks=pytest.mark.slow),
    ],
)
def test_an_exported_file_gives_the_models_logits_from_pixels(tmp_path: Path, kind: Format, architecture: str) -> None:
    uri, model = save_checkpoint(tmp_path, architecture)
    noise_BHWC = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    exporting.export_model(uri, kind, noise_BHWC, str(tmp_path / "out"))
    path = tmp_path / "out" / exporting.FILENAMES[kind]
    crops = [
        center_crop(decode_image(sample_images.draw_png(label, label, size=40)), PREPROCESSING)
        for label in (0, 1, 2, 0, 1)
    ]
    for images_BHWC in (np.stack(crops), np.stack(crops[:1])):
        with torch.inference_mode():
            expected_BC = model(
                normalization.to_normalized_batch(images_BHWC, PREPROCESSING, torch.device("cpu"))
            ).numpy()
        np.testing.assert_allclose(run_exported(path, images_BHWC), expected_BC, rtol=1e-3, atol=1e-4)


def read_metadata(path: Path) -> ExportMetadata:
    """Read the metadata in an exported file."""
    if path.suffix == ".pt2":
        extra_files = {"semiscale": ""}
        torch.export.load(path, extra_files=extra_files)
        return ExportMetadata.model_validate_json(extra_files["semiscale"])
    import onnxruntime

    properties = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return ExportMetadata.model_validate_json(properties["semiscale"])


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_an_exported_file_describes_itself(tmp_path: Path, kind: Format) -> None:
    uri, _ = save_checkpoint(tmp_path)
    exporting.export_model(uri, kind, np.zeros((2, 32, 32, 3), np.uint8), str(tmp_path))
    path = tmp_path / exporting.FILENAMES[kind]
    embedded, sidecar = read_metadata(path), ExportMetadata.model_validate_json(Path(f"{path}.json").read_text())
    assert embedded.classes == sidecar.classes == CLASSES
    assert embedded.preprocessing == PREPROCESSING
    assert "short side to 37 pixels" in embedded.before
    assert "32 x 32 x 3, RGB" in embedded.input
    assert sidecar.verified_images == 2
    assert sidecar.model_dump(exclude={"verified_images", "verified_difference"}) == embedded.model_dump(
        exclude={"verified_images", "verified_difference"}
    )


@pytest.mark.slow
def test_large_tensors_are_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONNX_FILE_BYTES", 0)
    uri, model = save_checkpoint(tmp_path)
    images_BHWC = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    exporting.export_model(uri, "onnx", images_BHWC, str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "model.onnx.json",
    }
    with torch.inference_mode():
        expected_BC = model(normalization.to_normalized_batch(images_BHWC, PREPROCESSING, torch.device("cpu"))).numpy()
    np.testing.assert_allclose(
        run_exported(tmp_path / "out" / "model.onnx", images_BHWC), expected_BC, rtol=1e-3, atol=1e-4
    )


def test_a_file_that_gives_other_logits_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, _ = save_checkpoint(tmp_path / "model")
    black = np.zeros((2, 32, 32, 3), np.uint8)
    # A negative tolerance refuses runtimes that agree to the bit.
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(SemiscaleError, match=r"SEMI-E140"):
        exporting.export_model(uri, "torch", black, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_verb_exports_the_student_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(stages.content))
    assert main(NO_PIPELINE, ["export", str(run_file)]) == 2
    assert "SEMI-E028" in capsys.readouterr().err
    assert stages.report
    assert main(NO_PIPELINE, ["export", str(run_file), "--format", "torch"]) == 0
    assert "checked on 8 validation images" in capsys.readouterr().out
    path = tmp_path / "work" / "trial" / "export" / "student" / "model.pt2"
    measured = {receipt.digest: receipt.checkpoint for receipt in stages.students}
    assert read_metadata(path).checkpoint == measured[stages.evaluation.models["student"].receipt]


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(NO_PIPELINE, ["export", str(tmp_path / "model.pth")]) == 2
    assert "[SEMI-E427]" in capsys.readouterr().err


def test_missing_packages_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(InvalidInputError, match=r"no_such_package.*SEMI-E141"):
        exporting.export_model(save_checkpoint(tmp_path)[0], "onnx", np.zeros((2, 32, 32, 3), np.uint8), str(tmp_path))
