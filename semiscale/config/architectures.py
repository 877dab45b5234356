"""Check that the networks of a run see the samples that the run has."""

from semiscale.common.errors import InvalidInputError
from semiscale.config.run_parameters import RunParameters
from semiscale.models import registry


def validate_architectures(settings: RunParameters) -> None:
    """Raise InvalidInputError if teacher or student does not see the run's samples.

    A run has images, or clips of video where `frames` is set.
    """
    if settings.teacher_frames and not settings.frames:
        raise InvalidInputError(
            f"teacher_frames: {settings.teacher_frames}, and the run has images; set frames, or leave it out"
        )
    for model in ("teacher", "student"):
        key = f"{model}_architecture"
        registry.get_architecture_for_input(getattr(settings, key), key, settings.clip_frames(model))
