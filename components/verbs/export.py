"""Export: a finished model as one file for other programs, checked against the model before it is stored."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.shared import checkpoints, runfile, storage
from components.shared.errors import Refused
from components.shared.receipts import PlanReceipt, Preprocessing, TrainReceipt, load
from components.shared.runfile import RunFile
from components.shared.shards import Columns
from components.shared.splits import read_split
from components.verbs.run import shown
from components.verbs.trained import is_run_file, of_run

if TYPE_CHECKING:
    from components.shared.export import Format
    from components.shared.preprocess import Batch

IMAGES = 8  # that a file is checked on


def export(source: str, kind: "Format", model: str, folder: str) -> None:
    """Export a model to ONNX or to torch.export's format: pixels in, logits out, the normalisation inside.

    The file is checked against the model: on validation images where a run file is given, else on noise.
    """
    from components.shared.export import export as write  # torch takes seconds to import

    if is_run_file(source):
        settings = runfile.load(Path(source)).located()
        uri = of_run(settings, model).checkpoint
        folder = folder or storage.join(settings.workdir, settings.name, "export", model)
        images_BHWC, said = validation_images(settings, uri), "validation images"
    else:
        uri = load(source, TrainReceipt).checkpoint if source.endswith(".json") else source
        folder = folder or uri.rpartition("/")[0] or "."
        images_BHWC, said = noise(uri), "images of noise"
    exported = write(uri, kind, images_BHWC, folder)
    print(f"{exported.architecture}, {len(exported.classes):,} classes: {exported.input}")
    print(f"before: {exported.before}")
    print(f"checked on {exported.verified_images} {said}: logits differ by {exported.verified_difference:.1e} at most")
    print(f"exported: {shown(storage.join(folder, exported.file))}")


def validation_images(settings: RunFile, uri: str) -> "Batch":
    """Return the first images of a run's validation split as a model sees them: uint8 images_BHWC.

    Of videos the clips in the middle.
    """
    from components.shared.views import view  # imports torch

    plan = load(storage.join(settings.workdir, settings.name, "receipts", "plan.json"), PlanReceipt)
    columns = Columns(settings.image_column, settings.label_column, settings.frames > 0)
    samples = (sample for shard in read_split(plan.validation) for sample, _ in shard.read(columns))
    preprocessing = _preprocessing(uri)
    views = [view(sample.image, preprocessing) for sample in islice(samples, IMAGES)]
    return np.stack([one[len(one) // 2] if preprocessing.frames else one for one in views])


def noise(uri: str) -> "Batch":
    """Return pixels drawn at random: uint8 images_BHWC, or clips_BTHWC, of a checkpoint's resolution."""
    from components.shared.views import shape  # imports torch

    preprocessing = _preprocessing(uri)
    one = shape(preprocessing)[1:] if preprocessing.frames else shape(preprocessing)
    return np.random.default_rng(0).integers(0, 256, (IMAGES, *one), np.uint8)


def _preprocessing(uri: str) -> Preprocessing:
    description = checkpoints.described(uri)
    if description is None:
        raise Refused(f"{uri}: no checkpoint of ours: .safetensors with a .json beside it, or a training's receipt")
    return description.preprocessing
