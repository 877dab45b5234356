"""The architectures by name, without torch: what a run file may say, and what a checkpoint says it is.

The residual networks are He et al. 2016 (arXiv:1512.03385), the grouped ones Xie et al. 2017 (arXiv:1611.05431), as the
paper's section 4.1 lists them; the `_small` ones are He et al.'s networks for 32x32 images (their section 4.2): 6n + 2
layers in three stages of 16, 32 and 64 channels, here times a width factor.
"""

from dataclasses import dataclass

from components.shared.errors import Refused, nearest


@dataclass(frozen=True)
class Architecture:
    """A residual network: blocks per stage, groups and width of the bottleneck (0 groups: basic blocks).

    `stem` is `imagenet` (7x7 stride 2, pooled: the image is reduced 32-fold) or `small` (3x3, reduced 4-fold).
    """

    name: str
    blocks: tuple[int, ...]
    groups: int = 1
    group_width: int = 64
    bottleneck: bool = True
    stem: str = "imagenet"
    width: int = 1


def _small(layers: int, width: int) -> Architecture:
    suffix = f"x{width}" if width > 1 else ""
    blocks = (layers - 2) // 6
    return Architecture(f"resnet{layers}{suffix}_small", (blocks,) * 3, bottleneck=False, stem="small", width=width)


_ALL = [
    Architecture("resnet18", (2, 2, 2, 2), bottleneck=False),
    Architecture("resnet50", (3, 4, 6, 3)),
    Architecture("resnext50_32x4d", (3, 4, 6, 3), 32, 4),
    Architecture("resnext101_32x4d", (3, 4, 23, 3), 32, 4),
    Architecture("resnext101_32x8d", (3, 4, 23, 3), 32, 8),
    Architecture("resnext101_32x16d", (3, 4, 23, 3), 32, 16),
    Architecture("resnext101_32x48d", (3, 4, 23, 3), 32, 48),
    *(_small(layers, width) for layers in (8, 14, 20, 32, 56) for width in (1, 2, 4)),
]
BY_NAME = {architecture.name: architecture for architecture in _ALL}


def find(name: str, key: str = "architecture") -> Architecture:
    """Return an architecture by name. Raises Refused with the run file's key and the nearest names."""
    if name not in BY_NAME:
        raise Refused(f"{key}: {name!r} is unknown{nearest(name, BY_NAME)}")
    return BY_NAME[name]
