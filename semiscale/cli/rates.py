"""Rates and prices for the verb `plan`: stated by the user, measured on this machine, or published."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semiscale.common.errors import InvalidInputError
from semiscale.config.validation_errors import format_validation_error

# Images per second of one RTX 3090, forward, 224 pixels, mixed precision, channels_last:
# https://github.com/huggingface/pytorch-image-models/blob/main/results/benchmark-infer-amp-nhwc-pt113-cu117-rtx3090.csv
PUBLISHED = {
    "resnet18": 11_083.0,
    "resnet50": 3_669.0,
    "resnext50_32x4d": 3_070.0,
    "resnext101_32x4d": 1_910.0,
    # Scaled from 32x16d by multiply-adds, because the table has it at another resolution.
    "resnext101_32x8d": 612.0 * 36.27 / 16.51,
    "resnext101_32x16d": 612.0,
    # Scaled from 32x32d by multiply-adds, because the table does not have it.
    "resnext101_32x48d": 275.0 * 87.29 / 153.57,
}
PUBLISHED_DEVICE = "RTX 3090"
PUBLISHED_SOURCE = f"timm's table for an {PUBLISHED_DEVICE}"
# Ratio of the forward rate to the training rate, from the same tables of the same card: resnext50_32x4d 3070 ÷ 1001,
# resnext101_32x4d 1910 ÷ 609.
FORWARDS_PER_STEP = 3.1

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class RateOverrides(BaseModel):
    """Rates and prices that a user states. Other rates are measured or published."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    decode_images_per_s: Positive | None = None
    """Images that one CPU core decodes and crops per second."""
    read_bytes_per_s: Positive | None = None
    """Bytes that one pod reads from the store per second."""
    teacher_forward_images_per_s: Positive | None = None
    """Images that the teacher scores per second, on one device."""
    teacher_train_images_per_s: Positive | None = None
    """Images that the teacher is trained on per second, on one device."""
    student_forward_images_per_s: Positive | None = None
    """Images that the student scores per second, on one device."""
    student_train_images_per_s: Positive | None = None
    """Images that the student is trained on per second, on one device."""
    training_devices: int = Field(default=1, ge=1)
    """Devices of one training."""
    cpus_per_device: Positive = 16.0
    """CPU cores for each device."""
    gpu_price_per_h: NotNegative = 0.0
    """Price of one device and its machine for an hour. 0: the cost of computing is left out."""
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
    """A rate and its source.

    Attributes:
        value: Samples or bytes per second.
        source: Origin of the value.
        device: Device that has this rate, or empty if it is unknown.
    """

    value: float
    source: str
    device: str = ""


RATED_MODELS = ("teacher", "student")
_MODEL_RATES = [f"{model}_{mode}_images_per_s" for model in RATED_MODELS for mode in ("forward", "train")]
MEASURABLE_RATES = ("decode_images_per_s", "read_bytes_per_s", *_MODEL_RATES)


def parse_rates(content: dict[str, object], source: str) -> RateOverrides:
    """Check the rates and prices that the user stated.

    Args:
        content: Values by name.
        source: File or option that gave them, for the message.

    Raises:
        InvalidInputError: A name is unknown or a value is out of range.
    """
    try:
        return RateOverrides.model_validate(content)
    except ValidationError as error:
        message = format_validation_error(error, RateOverrides.model_fields)
        raise InvalidInputError("SEMI-E100", f"{source}: {message}") from None


def published_rates(architecture: str, resolution: int) -> dict[str, Rate]:
    """Return the published rates of an architecture, or nothing if the table lacks it.

    Args:
        architecture: Name of the architecture.
        resolution: Height and width in pixels. The rate is scaled by multiply-adds from 224.

    Returns:
        Images per second of one device, by `forward` and `train`.
    """
    if architecture not in PUBLISHED:
        return {}
    forward = PUBLISHED[architecture] * (224 / resolution) ** 2
    scaled = "" if resolution == 224 else f", scaled to {resolution} pixels"
    return {
        "forward": Rate(forward, f"published: {PUBLISHED_SOURCE}{scaled}", PUBLISHED_DEVICE),
        "train": Rate(forward / FORWARDS_PER_STEP, f"published: forward ÷ {FORWARDS_PER_STEP}", PUBLISHED_DEVICE),
    }
