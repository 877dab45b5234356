"""The architectures by name, without torch: what a run file may say, and what a checkpoint says it is.

The residual networks are He et al. 2016 (arXiv:1512.03385), the grouped ones Xie et al. 2017 (arXiv:1611.05431), as the
paper's section 4.1 lists them; the `_small` ones are He et al.'s networks for 32x32 images (their section 4.2): 6n + 2
layers in three stages of 16, 32 and 64 channels, here times a width factor. R(2+1)D, for clips, is Tran et al. 2018
(arXiv:1711.11248), as in the paper's section 5.1. Every other image classifier of torchvision goes by its name there,
and every one of timm, where that is installed, by `timm/` and its name.
"""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from semiscale.common.errors import InvalidInputError, did_you_mean

Family = Literal["resnet", "small", "r2plus1d", "r2plus1d-small", "torchvision", "timm"]
TIMM = "timm/"


@dataclass(frozen=True)
class Architecture:
    """A network: of which family, and for residual ones blocks per stage, groups and width of the bottleneck.

    `resnet` reduces an image 32-fold (a stem of 7x7, stride 2, pooled), `small` 4-fold (a stem of 3x3); `r2plus1d` and
    `r2plus1d-small`, alike in this, see clips of any length instead of images. Of `torchvision` and `timm` only the
    name is known here.
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
        """Say whether it sees clips of video instead of images."""
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
    # Wider in the middle of a block than torchvision's r2plus1d_18; see networks.py.
    Architecture("r2plus1d_18", (2, 2, 2, 2), bottleneck=False, family="r2plus1d"),
    Architecture("r2plus1d_34", (3, 4, 6, 3), bottleneck=False, family="r2plus1d"),
    Architecture("r2plus1d_8_small", (1, 1, 1), bottleneck=False, family="r2plus1d-small"),
    *(_small(layers, width) for layers in (8, 14, 20, 32, 56) for width in (1, 2, 4)),
]
# Written out, because the import that would list them takes thirteen CPU-seconds, and the stage that checks a run file
# runs in an image without torch. A test compares them with torchvision's own list.
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
    """Return an architecture by name. Raises InvalidInputError with the run file's key and the nearest names."""
    if name.startswith(TIMM):
        return _timm_architecture(name, key)
    if name not in REGISTRY:
        raise InvalidInputError(f"{key}: {name!r} is unknown{did_you_mean(name, REGISTRY)}")
    return REGISTRY[name]


def get_architecture_for_input(name: str, key: str, frames: int) -> Architecture:
    """Return an architecture that sees what a run has: clips of so many frames, or, where that is 0, images.

    Raises InvalidInputError for one of the other kind, and as `find` does.
    """
    found = get_architecture(name, key)
    if found.is_video and not frames:
        raise InvalidInputError(
            f"{key}: {name!r} sees clips of video and the run has images; name a network for images, or set frames"
        )
    if not found.is_video and frames:
        raise InvalidInputError(
            f"{key}: {name!r} sees images and the run has videos (frames: {frames}); name r2plus1d_18 or r2plus1d_34"
        )
    return found


def _timm_architecture(name: str, key: str) -> Architecture:
    found = Architecture(name, family="timm")
    if importlib.util.find_spec("timm") is None:
        if importlib.util.find_spec("torch") is None:
            return found  # an image without torch has no timm either: the training stage's own check decides
        raise InvalidInputError(f"{key}: {name!r} needs timm, which is not installed here: pip install timm")
    import timm  # with torch thirteen CPU-seconds: only for those who name it

    if not timm.is_model(name.removeprefix(TIMM)):
        raise InvalidInputError(
            f"{key}: {name!r} is unknown{did_you_mean(name, (TIMM + known for known in timm.list_models()))}"
        )
    return found
