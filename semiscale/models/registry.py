"""List the architectures by name, without torch.

The residual networks are those of He et al. 2016 (arXiv:1512.03385), and the grouped ones those of Xie et al. 2017
(arXiv:1611.05431), as the paper's section 4.1 lists them. The `_small` networks are He et al.'s for 32x32 images (their
section 4.2). They have 6n + 2 layers in three stages of 16, 32 and 64 channels, times a width factor. R(2+1)D for clips
is that of Tran et al. 2018 (arXiv:1711.11248), as in the paper's section 5.1. Every other image classifier of
torchvision has its name there. Every network of timm, if that is installed, has the prefix `timm/`.
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from semiscale.common.errors import InvalidInputError, did_you_mean

Family = Literal["resnet", "small", "r2plus1d", "r2plus1d-small", "torchvision", "timm"]
TIMM = "timm/"


@dataclass(frozen=True)
class Architecture:
    """Family of a network, and the shape of its residual blocks.

    `resnet` reduces the resolution 32-fold: its stem is 7x7 with stride 2, followed by pooling. `small` reduces it
    4-fold with a stem of 3x3. `r2plus1d` and `r2plus1d-small` do the same for clips of any length. Networks of
    `torchvision` and `timm` are known by name only.

    Attributes:
        name: Name in the run file and in checkpoints.
        blocks: Number of blocks in each stage.
        groups: Groups of the middle convolution of a bottleneck.
        group_width: Channels of each group.
        bottleneck: Whether blocks are bottlenecks.
        family: Function that builds the network.
        width: Factor of the channels of a `small` network.
    """

    name: str
    blocks: tuple[int, ...] = ()
    groups: int = 1
    group_width: int = 64
    bottleneck: bool = True
    family: Family = "resnet"
    width: int = 1

    @property
    def is_video(self) -> bool:
        """Return whether the network takes clips of video instead of images."""
        return self.family in ("r2plus1d", "r2plus1d-small")


def _small(layers: int, width: int) -> Architecture:
    suffix = f"x{width}" if width > 1 else ""
    blocks = (layers - 2) // 6
    return Architecture(f"resnet{layers}{suffix}_small", (blocks,) * 3, bottleneck=False, family="small", width=width)


_BUILTIN = [
    Architecture("resnet18", (2, 2, 2, 2), bottleneck=False),
    Architecture("resnet50", (3, 4, 6, 3)),
    Architecture("resnext50_32x4d", (3, 4, 6, 3), 32, 4),
    Architecture("resnext101_32x4d", (3, 4, 23, 3), 32, 4),
    Architecture("resnext101_32x8d", (3, 4, 23, 3), 32, 8),
    Architecture("resnext101_32x16d", (3, 4, 23, 3), 32, 16),
    Architecture("resnext101_32x48d", (3, 4, 23, 3), 32, 48),
    # Its blocks have more middle channels than torchvision's r2plus1d_18 (see `networks`).
    Architecture("r2plus1d_18", (2, 2, 2, 2), bottleneck=False, family="r2plus1d"),
    Architecture("r2plus1d_34", (3, 4, 6, 3), bottleneck=False, family="r2plus1d"),
    Architecture("r2plus1d_8_small", (1, 1, 1), bottleneck=False, family="r2plus1d-small"),
    *(_small(layers, width) for layers in (8, 14, 20, 32, 56) for width in (1, 2, 4)),
]
# The names are written out because importing torchvision takes thirteen CPU-seconds, and the stage that checks a run
# file runs in an image without torch. A test compares them with torchvision's own list.
_TORCHVISION = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
    efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
    regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
    regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet34
    resnext101_64x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
    squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19
    vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""
_TORCHVISION_ENTRIES = [Architecture(name, family="torchvision") for name in _TORCHVISION.split()]
REGISTRY = {architecture.name: architecture for architecture in [*_BUILTIN, *_TORCHVISION_ENTRIES]}


def get_architecture(name: str, key: str = "architecture") -> Architecture:
    """Return an architecture by name.

    Args:
        name: Name of the architecture.
        key: Key of the name in the run file.

    Raises:
        InvalidInputError: The name is unknown (SEMI-E151), or timm is not installed (SEMI-E153).
    """
    if name.startswith(TIMM):
        return _timm_architecture(name, key)
    if name not in REGISTRY:
        raise InvalidInputError(
            "SEMI-E151", f"{key}: The architecture {name!r} is unknown{did_you_mean(name, REGISTRY)}"
        )
    return REGISTRY[name]


def get_architecture_for_input(name: str, key: str, frames: int) -> Architecture:
    """Return an architecture by name and check that it takes the run's samples.

    Args:
        name: Name of the architecture.
        key: Key of the name in the run file.
        frames: Frames of a clip, or 0 for images.

    Raises:
        InvalidInputError: The network takes the other kind of samples (SEMI-E152), or as in `get_architecture`.
    """
    architecture = get_architecture(name, key)
    if architecture.is_video and not frames:
        raise InvalidInputError(
            "SEMI-E152",
            f"{key}: {name!r} takes clips of video, and the run has images. Name a network for images, or set frames.",
        )
    if not architecture.is_video and frames:
        raise InvalidInputError(
            "SEMI-E152",
            f"{key}: {name!r} takes images, and the run has clips of {frames} frames. Name r2plus1d_18 or r2plus1d_34.",
        )
    return architecture


def _timm_architecture(name: str, key: str) -> Architecture:
    architecture = Architecture(name, family="timm")
    if importlib.util.find_spec("timm") is None:
        if importlib.util.find_spec("torch") is None:
            # An image without torch has no timm. The training stage checks the name in its own image.
            return architecture
        raise InvalidInputError("SEMI-E153", f"{key}: {name!r} needs timm, which is missing. Run pip install timm.")
    # timm and torch take thirteen CPU-seconds to import, so only runs that use timm import it.
    import timm

    if not timm.is_model(name.removeprefix(TIMM)):
        raise InvalidInputError(
            "SEMI-E151",
            f"{key}: The architecture {name!r} is unknown"
            f"{did_you_mean(name, (TIMM + known for known in timm.list_models()))}",
        )
    return architecture
