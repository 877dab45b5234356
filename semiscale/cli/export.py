"""The verb `export`: write a trained model as one file for other programs."""

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semiscale import storage
from semiscale.cli.command import Command, Options
from semiscale.cli.model_source import MODEL_NAMES, SOURCE_HELP, is_run_file, model_of_run
from semiscale.cli.run import display_path
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from semiscale.data.labeled import load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.models import checkpoint_metadata
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.storage.documents import load_document

if TYPE_CHECKING:
    from semiscale.data.transforms import Batch
    from semiscale.models.export import Format

# Images on which an exported file is compared with its model.
VERIFIED_IMAGES = 8


def export(source: str, kind: "Format", model: str, folder: str) -> None:
    """Export a model to ONNX or to the format of torch.export, and compare the file with the model.

    Args:
        source: A run file, a receipt of a training (.json) or a checkpoint.
        kind: Format of the exported file.
        model: Which model of the run, if the source is a run file.
        folder: URI of the folder to write to. Empty: in the run, or the folder of the checkpoint.

    Raises:
        InvalidInputError: There is no such model, or a package for the format is missing.
        SemiscaleError: The exported file and the model differ.
    """
    # torch takes seconds to import.
    from semiscale.models.export import export_model

    if is_run_file(source):
        settings = run_config.load_run_config(Path(source)).with_absolute_uris()
        uri = model_of_run(settings, model).checkpoint
        folder = folder or storage.join(settings.workdir, settings.name, "export", model)
        images_BHWC, description = validation_images(settings, uri), "validation images"
    else:
        uri = load_document(source, TrainReceipt).checkpoint if source.endswith(".json") else source
        folder = folder or uri.rpartition("/")[0] or "."
        images_BHWC, description = random_images(uri), "images of noise"
    exported = export_model(uri, kind, images_BHWC, folder)
    print(f"{exported.architecture}, {len(exported.classes):,} classes: {exported.input}")
    print(f"before: {exported.before}")
    print(
        f"checked on {exported.verified_images} {description}: "
        f"logits differ by {exported.verified_difference:.1e} at most"
    )
    print(f"exported: {display_path(storage.join(folder, exported.file))}")


def validation_images(settings: RunConfig, uri: str) -> "Batch":
    """Return the first images of the validation split of a run, as a model sees them.

    Args:
        settings: The run file.
        uri: URI of the checkpoint, whose preprocessing is applied.

    Returns:
        uint8 images_BHWC. Videos are represented by the clip in their middle.
    """
    # The module imports torch, which takes seconds.
    from semiscale.data.eval_transforms import eval_view

    plan = load_document(storage.join(settings.workdir, settings.name, "receipts", "plan.json"), PlanReceipt)
    columns = SampleFields(settings.image_column, settings.label_column, settings.frames > 0)
    samples = (sample for shard in load_split(plan.validation) for sample, _ in shard.iter_samples(columns))
    preprocessing = _preprocessing(uri)
    views = [eval_view(sample.image, preprocessing) for sample in islice(samples, VERIFIED_IMAGES)]
    return np.stack([view[len(view) // 2] if preprocessing.frames else view for view in views])


def random_images(uri: str) -> "Batch":
    """Return random pixels in the input shape of a checkpoint.

    Returns:
        uint8 images_BHWC, or clips_BTHWC for a network of videos.
    """
    # The module imports torch, which takes seconds.
    from semiscale.data.eval_transforms import eval_view_shape

    preprocessing = _preprocessing(uri)
    shape = eval_view_shape(preprocessing)[1:] if preprocessing.frames else eval_view_shape(preprocessing)
    return np.random.default_rng(0).integers(0, 256, (VERIFIED_IMAGES, *shape), np.uint8)


def _preprocessing(uri: str) -> Preprocessing:
    metadata = checkpoint_metadata.read_metadata(uri)
    if metadata is None:
        raise InvalidInputError(
            "SEMI-E427",
            f"{uri}: This is not a checkpoint of this program. Name a .safetensors file that has its .json in the same "
            "folder, or a receipt of a training.",
        )
    return metadata.preprocessing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("source", help=SOURCE_HELP)
    parser.add_argument("--format", choices=["onnx", "torch"], default="onnx")
    parser.add_argument("--model", choices=MODEL_NAMES, default="student", help="which one of the run file's run")
    parser.add_argument("--to", default="", metavar="FOLDER", help="URI; default: in the run, or by the checkpoint")


def execute(options: Options) -> None:
    """Run the verb."""
    export(options.source, options.format, options.model, options.to)


COMMAND = Command(
    help="write a model as an ONNX or torch.export file",
    description="Export a model to ONNX or to torch.export's format. The file takes pixels and returns logits; the\n"
    "normalisation is inside.\n\n"
    "The file is compared with the model before it is stored: on validation images if a run file is given, else on\n"
    "noise.",
    examples=("my-run.yaml --format onnx --to s3://bucket/serving",),
    add_arguments=add_arguments,
    execute=execute,
)
