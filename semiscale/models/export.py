"""Export a model to ONNX or torch.export, to run without this program.

The file takes decoded pixels. It contains the division, the normalization and the order of the axes, so that a user
cannot do them differently. Resizing comes first. It is described in the file and in a JSON document of the same name.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semiscale import storage
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import video_decoding
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.transforms import Batch, resize_short_side
from semiscale.models import checkpoint_io
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.normalization import Normalize, to_normalized_batch
from semiscale.storage.documents import StrictDocument

Format = Literal["onnx", "torch"]
FILENAMES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
# Limit of protobuf. The tensors of a larger model are stored in model.onnx.data.
ONNX_FILE_BYTES = 2_000_000_000
# Fraction of the largest logit. Two runtimes add in different orders.
TOLERANCE = 1e-3


class ExportMetadata(StrictDocument):
    """Description of an exported file.

    The file also contains it, under the key `semiscale`.
    """

    file: str
    format: Format
    architecture: str
    classes: list[str]
    input: str
    output: str
    before: str
    preprocessing: Preprocessing
    checkpoint: str
    opset: int | None
    verified_images: int = 0
    verified_difference: float | None = None


def export_model(uri: str, kind: Format, images_BHWC: Batch, folder: str) -> ExportMetadata:
    """Export a checkpoint, verify the file on some images, and store it.

    The file takes batches of any size, with the resolution of the model.

    Args:
        uri: URI of a checkpoint of this program.
        kind: Format of the file.
        images_BHWC: uint8 images, or clips_BTHWC, on which file and model are compared.
        folder: URI of the folder to store the file in.

    Returns:
        Description of the file, with the largest difference between logits.

    Raises:
        InvalidInputError: Packages for the format are missing (SEMI-E141), or there is no checkpoint.
        SemiscaleError: The file gives different logits (SEMI-E140). Nothing is stored.
    """
    if kind == "onnx":
        _check_onnx_installed()
    model, description = checkpoint_io.load_model(uri)
    described = _describe(uri, description, kind)
    with tempfile.TemporaryDirectory() as here, torch.no_grad():
        path = Path(here) / FILENAMES[kind]
        pixels_BHWC = torch.from_numpy(np.ascontiguousarray(images_BHWC))
        write, run = (_write_onnx, _run_onnx) if kind == "onnx" else (_write_torch, _run_torch)
        write(_NormalizedModel(model, description.preprocessing).eval(), pixels_BHWC, described, path)
        expected_BC = model(to_normalized_batch(images_BHWC, description.preprocessing, torch.device("cpu")))
        difference = _max_logit_difference(uri, expected_BC, images_BHWC, run(path))
        verified = described.model_copy(
            update={"verified_images": len(images_BHWC), "verified_difference": float(f"{difference:.3g}")}
        )
        for file in sorted(Path(here).iterdir()):
            storage.upload(file, storage.join(folder, file.name))
    storage.write_bytes(storage.join(folder, f"{FILENAMES[kind]}.json"), verified.model_dump_json(indent=1).encode())
    return verified


class _NormalizedModel(nn.Module):
    """Map uint8 images_BHWC, or clips_BTHWC, to the logits_BC of a model."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self._normalize = model, Normalize(preprocessing, torch.device("cpu"))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        return cast(Tensor, self.model(self._normalize(images_BHWC)))


Run = Callable[[Batch], NDArray[np.float32]]


def _describe(uri: str, description: CheckpointMetadata, kind: Format) -> ExportMetadata:
    preprocessing = description.preprocessing
    size, short, samples, frames = preprocessing.resolution, resize_short_side(preprocessing), "images", ""
    before = f"resize the short side to {short} pixels, bilinear and antialiased; cut the central {size} x {size}. "
    if preprocessing.frames:
        samples, frames = "clips", f"{preprocessing.frames} frames x "
        before = (
            f"take {video_decoding.EVAL_CLIPS} clips of {preprocessing.frames} neighbouring frames, "
            "uniformly spaced over the video, "
            f"to average their softmax; of each frame {before}"
        )
    return ExportMetadata(
        file=FILENAMES[kind],
        format=kind,
        architecture=description.architecture,
        classes=description.classes,
        input=f"{samples}: uint8, batch x {frames}{size} x {size} x 3, RGB, 0 to 255; the batch of any size",
        output="logits: float32, batch x classes, in the order of `classes`; their softmax are the probabilities",
        before=f"{before}Dividing by 255, `mean` and `std` are part of the file",
        preprocessing=preprocessing,
        checkpoint=uri,
        opset=OPSET if kind == "onnx" else None,
    )


def _write_torch(model: nn.Module, images_BHWC: Tensor, described: ExportMetadata, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images_BHWC,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={"semiscale": described.model_dump_json()})


def _run_torch(path: Path) -> Run:
    program = torch.export.load(path).module()
    return lambda images_BHWC: program(torch.from_numpy(images_BHWC)).numpy()


def _write_onnx(model: nn.Module, images_BHWC: Tensor, described: ExportMetadata, path: Path) -> None:
    program = torch.onnx.export(
        model,
        (images_BHWC,),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["semiscale"] = described.model_dump_json()
    size_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=size_bytes > ONNX_FILE_BYTES)


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_BHWC: session.run(["logits"], {"images": images_BHWC})[0]


def _max_logit_difference(uri: str, expected_BC: Tensor, images_BHWC: Batch, run: Run) -> float:
    """Return the largest difference between the logits of file and model.

    Both are compared on all images and on the first image alone.
    """
    expected = expected_BC.numpy()
    batches = [(images_BHWC, expected), (images_BHWC[:1], expected[:1])]
    difference = max(float(np.abs(run(images) - logits_BC).max()) for images, logits_BC in batches)
    allowed = TOLERANCE * float(np.abs(expected).max())
    if not difference <= allowed:
        raise SemiscaleError(
            "SEMI-E140",
            f"{uri}: The logits of the exported file differ by {difference:.3g}, and at most {allowed:.3g} is allowed. "
            "Export to the other format, or use other versions of torch and onnxruntime.",
        )
    return difference


def _check_onnx_installed() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            "SEMI-E141", f"export: ONNX needs {', '.join(missing)}. Run pip install {' '.join(missing)}."
        )
