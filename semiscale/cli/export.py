"""Export: a finished model as one file for other programs, checked against the model before it is stored."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semiscale import storage
from semiscale.cli.model_source import is_run_file, model_of_run
from semiscale.cli.run_local import display_path
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

IMAGES = 8  # that a file is checked on


def export(source: str, kind: "Format", model: str, folder: str) -> None:
    """Export a model to ONNX or to torch.export's format: pixels in, logits out, the normalisation inside.

    The file is checked against the model: on validation images where a run file is given, else on noise.
    """
    from semiscale.models.export import export_model as write  # torch takes seconds to import

    if is_run_file(source):
        settings = run_config.load_run_config(Path(source)).with_absolute_uris()
        uri = model_of_run(settings, model).checkpoint
        folder = folder or storage.join(settings.workdir, settings.name, "export", model)
        images_BHWC, said = validation_images(settings, uri), "validation images"
    else:
        uri = load_document(source, TrainReceipt).checkpoint if source.endswith(".json") else source
        folder = folder or uri.rpartition("/")[0] or "."
        images_BHWC, said = random_images(uri), "images of noise"
    exported = write(uri, kind, images_BHWC, folder)
    print(f"{exported.architecture}, {len(exported.classes):,} classes: {exported.input}")
    print(f"before: {exported.before}")
    print(f"checked on {exported.verified_images} {said}: logits differ by {exported.verified_difference:.1e} at most")
    print(f"exported: {display_path(storage.join(folder, exported.file))}")


def validation_images(settings: RunConfig, uri: str) -> "Batch":
    """Return the first images of a run's validation split as a model sees them: uint8 images_BHWC.

    Of videos the clips in the middle.
    """
    from semiscale.data.eval_transforms import eval_view  # imports torch

    plan = load_document(storage.join(settings.workdir, settings.name, "receipts", "plan.json"), PlanReceipt)
    columns = SampleFields(settings.image_column, settings.label_column, settings.frames > 0)
    samples = (sample for shard in load_split(plan.validation) for sample, _ in shard.iter_samples(columns))
    preprocessing = _preprocessing(uri)
    views = [eval_view(sample.image, preprocessing) for sample in islice(samples, IMAGES)]
    return np.stack([one[len(one) // 2] if preprocessing.frames else one for one in views])


def random_images(uri: str) -> "Batch":
    """Return pixels drawn at random: uint8 images_BHWC, or clips_BTHWC, of a checkpoint's resolution."""
    from semiscale.data.eval_transforms import eval_view_shape  # imports torch

    preprocessing = _preprocessing(uri)
    one = eval_view_shape(preprocessing)[1:] if preprocessing.frames else eval_view_shape(preprocessing)
    return np.random.default_rng(0).integers(0, 256, (IMAGES, *one), np.uint8)


def _preprocessing(uri: str) -> Preprocessing:
    description = checkpoint_metadata.read_metadata(uri)
    if description is None:
        raise InvalidInputError(
            f"{uri}: no checkpoint of ours: .safetensors with a .json beside it, or a training's receipt"
        )
    return description.preprocessing
