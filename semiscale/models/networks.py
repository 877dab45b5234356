"""The networks: built by architecture, their heads found, and what they cannot see refused.

A state dict of ours, of torchvision's and of the authors' released models names the same tensors of the same network.
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
    """What a small network is made of: a 3x3 convolution, one of a single place, each by entering and leaving channels
    and stride, and what normalises."""

    wide: Callable[[int, int, int], nn.Module]
    narrow: Callable[[int, int, int], nn.Module]
    normalise: Callable[[int], nn.Module]


class SmallResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of basic blocks at full, half and quarter resolution.

    Its layers say whether it sees images_BCHW, or clips_BCTHW, whose time is then halved with the resolution.
    """

    def __init__(self, architecture: Architecture, classes: int, layers: _LayerFactory) -> None:
        super().__init__()
        channels = [16 * architecture.width * 2**stage for stage in range(3)]
        stages = []
        entering = channels[0]
        for stage, leaving in enumerate(channels):
            for block in range(architecture.blocks[stage]):
                stages.append(_Block(entering, leaving, 2 if stage and not block else 1, layers))
                entering = leaving
        self.stem = nn.Sequential(layers.wide(3, channels[0], 1), layers.normalise(channels[0]), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, samples: Tensor) -> Tensor:
        features = self.stages(self.stem(samples))
        return cast(Tensor, self.fc(features.mean(tuple(range(2, features.dim())))))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the size changes (He et al. 2016, figure 2)."""

    def __init__(self, entering: int, leaving: int, stride: int, layers: _LayerFactory) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            layers.wide(entering, leaving, stride),
            layers.normalise(leaving),
            nn.ReLU(inplace=True),
            layers.wide(leaving, leaving, 1),
            layers.normalise(leaving),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or entering != leaving:
            self.shortcut = nn.Sequential(layers.narrow(entering, leaving, stride), layers.normalise(leaving))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.residual(features) + self.shortcut(features))


def _conv2plus1d(entering: int, leaving: int, stride: int) -> nn.Sequential:
    """Return a 3x3x3 convolution cut into one over space and one over time (see `_r2plus1d`)."""
    between = _mid_channels(entering, leaving)
    return nn.Sequential(
        nn.Conv3d(entering, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(inplace=True),
        nn.Conv3d(between, leaving, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


def _mid_channels(entering: int, leaving: int) -> int:
    """Return how many channels between the two keep the parameters of a 3x3x3 convolution (Tran et al., 3.5)."""
    return 27 * entering * leaving // (9 * entering + 3 * leaving)


_OF_IMAGES = _LayerFactory(
    lambda entering, leaving, stride: nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False),
    lambda entering, leaving, stride: nn.Conv2d(entering, leaving, 1, stride, bias=False),
    nn.BatchNorm2d,
)
_OF_CLIPS = _LayerFactory(
    _conv2plus1d, lambda entering, leaving, stride: nn.Conv3d(entering, leaving, 1, stride, bias=False), nn.BatchNorm3d
)


def build_model(name: str, classes: int, resolution: int = 224) -> nn.Module:
    """Build a network with fresh weights from torch's global generator: images_BCHW, or clips_BCTHW, to logits_BC.

    Raises InvalidInputError for an unknown name, and for a network of torchvision or timm that cannot see that
    resolution.
    """
    architecture = registry.get_architecture(name)
    network = _BUILDERS[architecture.family](architecture, classes, resolution)
    if architecture.family in ("torchvision", "timm"):
        _check_output_shape(network, name, classes, resolution)
    return network


def head_parameter_names(name: str, classes: int, resolution: int = 224) -> set[str]:
    """Return the names of the parameters that belong to the classes: those whose shape depends on their number.

    It costs two networks without storage, a second for the largest.
    """
    shapes, others = (_shapes(name, number, resolution) for number in (classes, classes + 1))
    return {tensor for tensor, shape in shapes.items() if others[tensor] != shape}


def linear_head_name(model: nn.Module, name: str, resolution: int = 224) -> str:
    """Return the name of the one linear layer that gives a network's logits. Raises InvalidInputError where it has
    no such."""
    layers = {tensor.rpartition(".")[0] for tensor in head_parameter_names(name, 2, resolution)}
    if len(layers) > 1 or not all(isinstance(model.get_submodule(layer), nn.Linear) for layer in layers):
        raise InvalidInputError(
            f"{name}: its logits are not those of one linear layer, which fc-only trains; take full-ft"
        )
    return layers.pop()


def check_batch_norm_batch(network: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Raise InvalidInputError where a network cannot be trained on so few samples at a time: what batch
    normalisation averages
    over are samples and places, and one place of one sample has no deviation. Computes shapes, no values.
    """
    training = network.training
    network.train()
    try:
        _run_on_meta(network, shape)
    except ValueError as error:
        seen = " x ".join(map(str, shape[2:]))
        raise InvalidInputError(
            f"device_batch_size: {name} cannot be trained on {shape[0]} of {seen} at a time ({error}); raise it, "
            "batch_size or resolution"
        ) from None
    finally:
        network.train(training)


def run_head_in_fp32(model: nn.Module, heads: set[str]) -> nn.Module:
    """Let the layers that own these tensors run in fp32 under autocast; changes the model and returns it.

    Scores are ranked by the logits: in bf16 a class's best images would tie (section 3.2 ranks them all).
    """
    for layer in {tensor.rpartition(".")[0] for tensor in heads}:
        model.set_submodule(layer, _Fp32Layer(model.get_submodule(layer)))
    return model


class _Fp32Layer(nn.Module):
    """A layer outside autocast."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.layer(features.float()))


def _residual(architecture: Architecture, classes: int, _: int) -> nn.Module:
    # torchvision costs eight CPU-seconds to import, on top of torch's five: here and below only for those who need it.
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


def _small(architecture: Architecture, classes: int, _: int) -> nn.Module:
    return SmallResNet(architecture, classes, _OF_IMAGES)


def _r2plus1d(architecture: Architecture, classes: int, _: int) -> nn.Module:
    """Build R(2+1)D (Tran et al. 2018), the length of the clip free.

    A 3x3x3 convolution is cut into 1x3x3 and 3x1x1 with as many channels between as keep its number of parameters
    (their section 3.5), for each of a block's two convolutions, as the authors' code does (facebookresearch/VMZ); this
    gives the paper's table 7: 33M parameters and 21B multiply-adds. torchvision takes the first one's number for both
    (31.5M). Normalisation divides by the deviation + 1e-3, Caffe2's constant, as those released weights expect.
    """
    from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

    class Convolution(Conv2Plus1D):  # type: ignore[misc]  # torchvision has no types
        def __init__(self, entering: int, leaving: int, _: int, stride: int = 1, padding: int = 1) -> None:
            super().__init__(entering, leaving, _mid_channels(entering, leaving), stride, padding)

    network = VideoResNet(BasicBlock, [Convolution] * 4, list(architecture.blocks), R2Plus1dStem, classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-3
    return cast(nn.Module, network)


def _torchvision(architecture: Architecture, classes: int, resolution: int) -> nn.Module:
    from torchvision.models import get_model

    options: dict[str, object] = {}
    if architecture.name in ("googlenet", "inception_v3"):  # without their second heads, which only training used
        options = {"aux_logits": False, "init_weights": True}
    if architecture.name.startswith("vit_"):
        options = {"image_size": resolution}
    try:
        return cast(nn.Module, get_model(architecture.name, num_classes=classes, **options))
    except (ValueError, AssertionError) as error:
        raise _unsupported_resolution(architecture.name, resolution, error) from None


def _timm(architecture: Architecture, classes: int, _: int) -> nn.Module:
    import timm

    return cast(nn.Module, timm.create_model(architecture.name.removeprefix(TIMM), num_classes=classes))


_BUILDERS: dict[str, Callable[[Architecture, int, int], nn.Module]] = {
    "resnet": _residual,
    "small": _small,
    "r2plus1d": _r2plus1d,
    "r2plus1d-small": lambda architecture, classes, _: SmallResNet(architecture, classes, _OF_CLIPS),
    "torchvision": _torchvision,
    "timm": _timm,
}


def _check_output_shape(network: nn.Module, name: str, classes: int, resolution: int) -> None:
    """Raise InvalidInputError where two images of this resolution do not give two rows of logits; computes shapes,
    no values."""
    training = network.training
    network.eval()
    try:
        logits_BC = _run_on_meta(network, (2, 3, resolution, resolution))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _unsupported_resolution(name, resolution, error) from None
    network.train(training)
    if not isinstance(logits_BC, Tensor) or logits_BC.shape != (2, classes):
        raise InvalidInputError(f"{name}: gives no logits of {classes} classes; name a classifier of images")


@torch.no_grad()
def _run_on_meta(network: nn.Module, shape: Sequence[int]) -> Any:
    """Return what a network gives for samples of this shape, in the mode it is in: shapes, no values."""
    without_storage = {
        key: torch.empty_like(tensor, device="meta")
        for key, tensor in [*network.named_parameters(), *network.named_buffers()]
    }
    return functional_call(network, without_storage, (torch.empty(*shape, device="meta"),))


def _unsupported_resolution(name: str, resolution: int, error: Exception) -> InvalidInputError:
    reason = str(error).strip().partition("\n")[0]
    return InvalidInputError(
        f"{name}: cannot see images of {resolution} x {resolution} pixels ({reason}); change resolution"
    )


class _SkipInit(TorchFunctionMode):
    """Leaves fresh weights as they are: filling them without storage makes torch load its compiler, four seconds."""

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _shapes(name: str, classes: int, resolution: int) -> dict[str, torch.Size]:
    architecture = registry.get_architecture(name)
    builder = _BUILDERS[architecture.family]
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _SkipInit():
                network = builder(architecture, classes, resolution)
        except NotImplementedError:  # a constructor that looks at values, as RegNet's does
            network = builder(architecture, classes, resolution)
    return {key: tensor.shape for key, tensor in network.named_parameters()}
