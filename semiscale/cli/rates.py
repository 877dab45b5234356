"""How fast and how dear things are, for `plan`: stated by the user, measured here, or published; each says which."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semiscale.common.errors import InvalidInputError
from semiscale.config.validation_errors import format_validation_error

# Images a second of one RTX 3090, forward, 224 pixels, mixed precision, channels_last:
# https://github.com/huggingface/pytorch-image-models/blob/main/results/benchmark-infer-amp-nhwc-pt113-cu117-rtx3090.csv
PUBLISHED = {
    "resnet18": 11_083.0,
    "resnet50": 3_669.0,
    "resnext50_32x4d": 3_070.0,
    "resnext101_32x4d": 1_910.0,
    "resnext101_32x8d": 612.0 * 36.27 / 16.51,  # of 32x16d, by multiply-adds: the table has it at another resolution
    "resnext101_32x16d": 612.0,
    "resnext101_32x48d": 275.0 * 87.29 / 153.57,  # of 32x32d, by multiply-adds: the table has no 32x48d
}
PUBLISHED_SOURCE = "timm's table for an RTX 3090"
# A training step for each forward pass: resnext50_32x4d 3070 ÷ 1001, resnext101_32x4d 1910 ÷ 609, same card and tables.
FORWARDS_PER_STEP = 3.1

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class RateOverrides(BaseModel):
    """What a user may state; the rest is measured or published."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    decode_images_per_s: Positive | None = None
    """Images that one CPU core decodes and cuts a second."""
    read_bytes_per_s: Positive | None = None
    """Bytes that one pod reads from the store a second."""
    teacher_forward_images_per_s: Positive | None = None
    """Images that the teacher scores a second, on one device."""
    teacher_train_images_per_s: Positive | None = None
    """Images that the teacher is trained on a second, on one device."""
    student_forward_images_per_s: Positive | None = None
    """The same of the student's network, scoring."""
    student_train_images_per_s: Positive | None = None
    """The same of the student's network, training."""
    training_devices: int = Field(default=1, ge=1)
    """Devices of one training."""
    cpus_per_device: Positive = 16.0
    """CPU cores beside each device."""
    gpu_price_per_h: NotNegative = 0.0
    """Price of one device and its machine for an hour; without it there is no cost of computing."""
    cpu_price_per_h: NotNegative = 0.0
    """Price of a CPU core for an hour, for the stages without a device."""
    storage_price_per_gb_month: NotNegative = 0.02
    """Price of keeping 10^9 bytes for a month (list price of standard storage: GCS in a US region)."""
    read_price_per_1000: NotNegative = 0.0004
    """Price of 1,000 GET requests (list price: GCS class B, S3 GET)."""
    write_price_per_1000: NotNegative = 0.005
    """Price of 1,000 PUT or LIST requests (list price: GCS class A, S3 PUT)."""


@dataclass(frozen=True)
class Rate:
    """A figure, and where it comes from."""

    value: float
    source: str


MODELS = ("teacher", "student")
_OF_MODELS = [f"{model}_{what}_images_per_s" for model in MODELS for what in ("forward", "train")]
MEASURABLE_RATES = ("decode_images_per_s", "read_bytes_per_s", *_OF_MODELS)


def parse_rates(content: dict[str, object], where: str) -> RateOverrides:
    """Check what was stated. Raises InvalidInputError with one line that names the key."""
    try:
        return RateOverrides.model_validate(content)
    except ValidationError as error:
        raise InvalidInputError(f"{where}: {format_validation_error(error, RateOverrides.model_fields)}") from None


def published_rates(architecture: str, resolution: int) -> dict[str, Rate]:
    """Return an architecture's published rates, forward and training; at another resolution by multiply-adds."""
    if architecture not in PUBLISHED:
        return {}
    forward = PUBLISHED[architecture] * (224 / resolution) ** 2
    scaled = "" if resolution == 224 else f", scaled to {resolution} pixels"
    return {
        "forward": Rate(forward, f"published: {PUBLISHED_SOURCE}{scaled}"),
        "train": Rate(forward / FORWARDS_PER_STEP, f"published: forward ÷ {FORWARDS_PER_STEP}"),
    }
