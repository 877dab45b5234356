"""Check that the networks of a run accept its samples."""

from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import RunParameters
from semiscale.models import registry


def validate_architectures(settings: RunParameters) -> None:
    """Check that the teacher and the student accept the samples of the run.

    A run has clips of video if `frames` is set, and images otherwise.

    Raises:
        InvalidInputError: `teacher_frames` is set in a run with images (SEMI-E105), an architecture is unknown
            (SEMI-E151), it takes the other kind of samples (SEMI-E152), or timm is missing (SEMI-E153).
    """
    if settings.teacher_frames and not settings.frames:
        raise InvalidInputError(
            "SEMI-E105",
            f"teacher_frames: the value is {settings.teacher_frames}, but the run has images. "
            "Set frames, or leave teacher_frames out.",
        )
    for model in ("teacher", "student"):
        key = f"{model}_architecture"
        registry.get_architecture_for_input(getattr(settings, key), key, settings.clip_frames(model))
