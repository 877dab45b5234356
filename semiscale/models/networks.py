"""Build networks, find their heads, and refuse inputs that they cannot take.

State dicts of this program, of torchvision and of the authors' released models use the same names for the same network.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from semiscale.common.errors import InvalidInputError
from semiscale.models import registry
from semiscale.models.registry import TIMM, Architecture


class _LayerFactory(NamedTuple):
    """Functions that make the layers of a small network.

    Attributes:
        conv3x3: Makes a 3x3 convolution of input channels, output channels and stride.
        conv1x1: Makes a 1x1 convolution of input channels, output channels and stride.
        norm: Makes batch normalization of a number of channels.
    """

    conv3x3: Callable[[int, int, int], nn.Module]
    conv1x1: Callable[[int, int, int], nn.Module]
    norm: Callable[[int], nn.Module]


class SmallResNet(nn.Module):
    """Residual network for small images (He et al. 2016, section 4.2).

    It has three stages of basic blocks at full, half and quarter resolution.

    Args:
        architecture: Blocks of each stage, and width.
        classes: Number of classes.
        layers: Layers for images_BCHW, or for clips_BCTHW. Strides of clips also halve the time.
    """

    def __init__(self, architecture: Architecture, classes: int, layers: _LayerFactory) -> None:
        super().__init__()
        channels = [16 * architecture.width * 2**stage for stage in range(3)]
        stages = []
        in_channels = channels[0]
        for stage, out_channels in enumerate(channels):
            for block in range(architecture.blocks[stage]):
                stages.append(_Block(in_channels, out_channels, 2 if stage and not block else 1, layers))
                in_channels = out_channels
        self.stem = nn.Sequential(layers.conv3x3(3, channels[0], 1), layers.norm(channels[0]), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, samples: Tensor) -> Tensor:
        features = self.stages(self.stem(samples))
        return cast(Tensor, self.fc(features.mean(tuple(range(2, features.dim())))))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2).

    The shortcut is a 1x1 convolution if the size changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, layers: _LayerFactory) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            layers.conv3x3(in_channels, out_channels, stride),
            layers.norm(out_channels),
            nn.ReLU(inplace=True),
            layers.conv3x3(out_channels, out_channels, 1),
            layers.norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(layers.conv1x1(in_channels, out_channels, stride), layers.norm(out_channels))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.residual(features) + self.shortcut(features))


def _conv2plus1d(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Split a 3x3x3 convolution into space and time (see `_build_r2plus1d`)."""
    between = _mid_channels(in_channels, out_channels)
    return nn.Sequential(
        nn.Conv3d(in_channels, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(inplace=True),
        nn.Conv3d(between, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


def _mid_channels(in_channels: int, out_channels: int) -> int:
    """Return the channels between the two convolutions (Tran et al. 2018, 3.5).

    They keep the number of parameters of a 3x3x3 convolution.
    """
    return 27 * in_channels * out_channels // (9 * in_channels + 3 * out_channels)


_IMAGE_LAYERS = _LayerFactory(
    lambda in_channels, out_channels, stride: nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
    lambda in_channels, out_channels, stride: nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
    nn.BatchNorm2d,
)
_CLIP_LAYERS = _LayerFactory(
    _conv2plus1d,
    lambda in_channels, out_channels, stride: nn.Conv3d(in_channels, out_channels, 1, stride, bias=False),
    nn.BatchNorm3d,
)


def build_model(name: str, classes: int, resolution: int = 224) -> nn.Module:
    """Build a network that maps images_BCHW, or clips_BCTHW, to logits_BC.

    The weights are drawn from torch's global generator.

    Args:
        name: Name of the architecture.
        classes: Number of classes.
        resolution: Pixels on a side of the images.

    Raises:
        InvalidInputError: The name is unknown (SEMI-E151), or the network cannot take the resolution (SEMI-E142).
    """
    architecture = registry.get_architecture(name)
    network = _BUILDERS[architecture.family](architecture, classes, resolution)
    if architecture.family in ("torchvision", "timm"):
        _check_output_shape(network, name, classes, resolution)
    return network


def head_parameter_names(name: str, classes: int, resolution: int = 224) -> set[str]:
    """Return the names of the parameters whose shape depends on the number of classes.

    Cost: two networks without storage, which take a second for the largest.

    Args:
        name: Name of the architecture.
        classes: Number of classes.
        resolution: Pixels on a side of the images.
    """
    shapes, others = (_parameter_shapes(name, number, resolution) for number in (classes, classes + 1))
    return {tensor for tensor, shape in shapes.items() if others[tensor] != shape}


def linear_head_name(model: nn.Module, name: str, resolution: int = 224) -> str:
    """Return the name of the linear layer that gives a network's logits.

    Args:
        model: Network.
        name: Name of its architecture.
        resolution: Pixels on a side of the images.

    Raises:
        InvalidInputError: The logits are not those of one linear layer (SEMI-E144).
    """
    layers = {tensor.rpartition(".")[0] for tensor in head_parameter_names(name, 2, resolution)}
    if len(layers) > 1 or not all(isinstance(model.get_submodule(layer), nn.Linear) for layer in layers):
        raise InvalidInputError(
            "SEMI-E144", f"{name}: The logits are not those of one linear layer, which fc-only trains. Use full-ft."
        )
    return layers.pop()


def check_batch_norm_batch(network: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Check that a network can be trained on this many samples at a time.

    Batch normalization averages over samples and positions. One position of one sample has no deviation. The check
    computes shapes without values.

    Args:
        network: Network, whose mode is left as it is.
        name: Name of its architecture.
        shape: Axes of the smallest batch, BCHW or BCTHW.

    Raises:
        InvalidInputError: The batch is too small (SEMI-E145).
    """
    training = network.training
    network.train()
    try:
        _run_on_meta(network, shape)
    except ValueError as error:
        size = " x ".join(map(str, shape[2:]))
        raise InvalidInputError(
            "SEMI-E145",
            f"device_batch_size: {name} cannot be trained on {shape[0]} of {size} at a time ({error}). "
            "Raise device_batch_size, batch_size or resolution.",
        ) from None
    finally:
        network.train(training)


def run_head_in_fp32(model: nn.Module, heads: set[str]) -> nn.Module:
    """Make the head run in fp32 under autocast.

    Scores are ranked by the logits. In bf16 a class's best images would tie, and section 3.2 ranks them all.

    Args:
        model: Model that is changed in place.
        heads: Names of the head's parameters.

    Returns:
        The same model.
    """
    for layer in {tensor.rpartition(".")[0] for tensor in heads}:
        model.set_submodule(layer, _Fp32Layer(model.get_submodule(layer)))
    return model


class _Fp32Layer(nn.Module):
    """Run a layer outside autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.layer(features.float()))


def _build_resnet(architecture: Architecture, classes: int, _: int) -> nn.Module:
    # torchvision takes eight CPU-seconds to import, on top of torch's five. Only networks that need it import it.
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    return cast(
        nn.Module,
        ResNet(
            Bottleneck if architecture.bottleneck else BasicBlock,
            list(architecture.blocks),
            num_classes=classes,
            groups=architecture.groups,
            width_per_group=architecture.group_width,
        ),
    )


def _build_small(architecture: Architecture, classes: int, _: int) -> nn.Module:
    return SmallResNet(architecture, classes, _IMAGE_LAYERS)


def _build_r2plus1d(architecture: Architecture, classes: int, _: int) -> nn.Module:
    """Build R(2+1)D (Tran et al. 2018) for clips of any length.

    A 3x3x3 convolution is split into 1x3x3 and 3x1x1. The channels between them keep its number of parameters (their
    section 3.5). They are computed for each of a block's two convolutions, as in the authors' code
    (facebookresearch/VMZ). This gives the paper's table 7: 33M parameters and 21B multiply-adds. torchvision uses the
    number of the first convolution for both (31.5M). Batch normalization has an epsilon of 1e-3, Caffe2's constant,
    which the released weights expect.
    """
    from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

    class Convolution(Conv2Plus1D):  # type: ignore[misc]  # torchvision has no types
        def __init__(self, in_channels: int, out_channels: int, _: int, stride: int = 1, padding: int = 1) -> None:
            super().__init__(in_channels, out_channels, _mid_channels(in_channels, out_channels), stride, padding)

    network = VideoResNet(BasicBlock, [Convolution] * 4, list(architecture.blocks), R2Plus1dStem, classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-3
    return cast(nn.Module, network)


def _build_torchvision(architecture: Architecture, classes: int, resolution: int) -> nn.Module:
    from torchvision.models import get_model

    options: dict[str, object] = {}
    # The auxiliary heads of these networks are used in training only.
    if architecture.name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    if architecture.name.startswith("vit_"):
        options = {"image_size": resolution}
    try:
        return cast(nn.Module, get_model(architecture.name, num_classes=classes, **options))
    except (ValueError, AssertionError) as error:
        raise _unsupported_resolution(architecture.name, resolution, error) from None


def _build_timm(architecture: Architecture, classes: int, _: int) -> nn.Module:
    import timm

    return cast(nn.Module, timm.create_model(architecture.name.removeprefix(TIMM), num_classes=classes))


_BUILDERS: dict[str, Callable[[Architecture, int, int], nn.Module]] = {
    "resnet": _build_resnet,
    "small": _build_small,
    "r2plus1d": _build_r2plus1d,
    "r2plus1d-small": lambda architecture, classes, _: SmallResNet(architecture, classes, _CLIP_LAYERS),
    "torchvision": _build_torchvision,
    "timm": _build_timm,
}


def _check_output_shape(network: nn.Module, name: str, classes: int, resolution: int) -> None:
    """Check the shape of the logits of two images, without computing values."""
    training = network.training
    network.eval()
    try:
        logits_BC = _run_on_meta(network, (2, 3, resolution, resolution))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _unsupported_resolution(name, resolution, error) from None
    network.train(training)
    if not isinstance(logits_BC, Tensor) or logits_BC.shape != (2, classes):
        raise InvalidInputError(
            "SEMI-E143", f"{name}: The network gives no logits of {classes} classes. Name a classifier of images."
        )


@torch.no_grad()
def _run_on_meta(network: nn.Module, shape: Sequence[int]) -> Any:
    """Run a network in its current mode on the meta device, without values."""
    without_storage = {
        key: torch.empty_like(tensor, device="meta")
        for key, tensor in [*network.named_parameters(), *network.named_buffers()]
    }
    return functional_call(network, without_storage, (torch.empty(*shape, device="meta"),))


def _unsupported_resolution(name: str, resolution: int, error: Exception) -> InvalidInputError:
    reason = str(error).strip().partition("\n")[0]
    return InvalidInputError(
        "SEMI-E142",
        f"{name}: The network cannot take images of {resolution} x {resolution} pixels ({reason}). Change resolution.",
    )


class _SkipInit(TorchFunctionMode):
    """Skip random initialization.

    On the meta device it makes torch load its compiler, which takes four seconds.
    """

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _parameter_shapes(name: str, classes: int, resolution: int) -> dict[str, torch.Size]:
    architecture = registry.get_architecture(name)
    builder = _BUILDERS[architecture.family]
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _SkipInit():
                network = builder(architecture, classes, resolution)
        # Some constructors, such as RegNet's, read values, which the meta device does not have.
        except NotImplementedError:
            network = builder(architecture, classes, resolution)
    return {key: tensor.shape for key, tensor in network.named_parameters()}
