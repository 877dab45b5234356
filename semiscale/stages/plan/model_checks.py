"""Check the models of a run file: architectures, weights, video options, teacher."""

from semiscale.common.errors import InvalidInputError
from semiscale.config import architectures
from semiscale.config.run_parameters import RunParameters
from semiscale.data import video_decoding
from semiscale.data.preprocessing import Preprocessing
from semiscale.models import checkpoint_metadata

CHECKPOINT_KEYS = ("teacher_checkpoint", "teacher_start_weights", "student_start_weights")
IMAGE_ONLY_KEYS = ("augmentation", "baseline_recipe", "decoder")


def check_models(config: RunParameters) -> None:
    """Check architectures, video options and checkpoints, before data are read.

    Args:
        config: The run file.

    Raises:
        InvalidInputError: If an architecture does not fit the samples, a checkpoint cannot be read, or two keys
            contradict each other.
    """
    architectures.validate_architectures(config)
    check_video_options(config)
    for key in CHECKPOINT_KEYS:
        if uri := getattr(config, key):
            checkpoint_metadata.checkpoint_version(uri, key)
    if config.teacher_checkpoint and config.teacher_start_weights:
        raise InvalidInputError(
            "SEMI-E206",
            "teacher_start_weights: a ready-made teacher is not trained. Leave out this key or teacher_checkpoint.",
        )
    if config.teacher_classes and not config.teacher_checkpoint:
        raise InvalidInputError(
            "SEMI-E207",
            "teacher_classes: this key describes the outputs of a ready-made teacher, and the run has none. "
            "Set teacher_checkpoint, or leave out this key.",
        )


def check_video_options(config: RunParameters) -> None:
    """Check that a run of videos sets no option for images, and that PyAV is installed.

    Args:
        config: The run file. Nothing is checked if `frames` is 0.

    Raises:
        InvalidInputError: If an option for images is set, or PyAV is missing.
    """
    if not config.frames:
        return
    video_decoding.require_pyav()
    for key in IMAGE_ONLY_KEYS:
        default = RunParameters.model_fields[key].default
        if (value := getattr(config, key)) != default:
            raise InvalidInputError(
                "SEMI-E208",
                f"{key}: {value} is for images, and this run has videos. Leave it out: clips are cut at random "
                "positions in time and space.",
            )


def check_teacher(config: RunParameters, classes: list[str]) -> None:
    """Check that a ready-made teacher has the classes and the input size of this run.

    Args:
        config: The run file. Nothing is checked if `teacher_checkpoint` is empty.
        classes: Class names of the run, in label order.

    Raises:
        InvalidInputError: If the checkpoint's metadata differ from the run. A checkpoint without metadata passes.
    """
    if not config.teacher_checkpoint:
        return
    expected = checkpoint_metadata.CheckpointMetadata(
        architecture=config.teacher_architecture,
        classes=classes,
        preprocessing=Preprocessing(
            resolution=config.resolution, augmentation=config.augmentation, frames=config.clip_frames("teacher")
        ),
        recipe="teacher",
        digest="",
    )
    uri = checkpoint_metadata.parse_checkpoint_ref(config.teacher_checkpoint, "teacher_checkpoint").uri
    checkpoint_metadata.check_compatible(uri, config.teacher_classes, expected)
