"""Check that the networks of a run accept the samples that it has."""

from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import RunParameters
from semiscale.models import registry


def validate_architectures(settings: RunParameters) -> None:
    """Raise InvalidInputError if teacher or student does not see the run's samples.

    A run has images, or clips of video where `frames` is set.
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
