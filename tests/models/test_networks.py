"""Test the sizes of networks, and every name that a run file may contain."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from semiscale.common.errors import InvalidInputError
from semiscale.models import networks, registry

# The values are parameters in millions and multiply-adds in billions, first as published, then as counted here with the
# head. Table 3 of the paper has the parameters of image networks, and table 7 the numbers of clips. The paper does not
# count the multiply-adds of images. They are in the README of its released models
# (facebookresearch/semi-supervised-ImageNet1K-models). Published numbers are truncated, and some seem to omit the head,
# so 3 % are allowed. ResNet-18 has 11.7M parameters. The paper has 8.6M and the README has 14M, so neither is checked.
# For ResNeXt-101 32x4d the paper has 43M and the README has 42M.
IMAGES = {
    "resnet18": (None, 2, 11.69, 1.81),
    "resnet50": (25, 4, 25.56, 4.09),
    "resnext50_32x4d": (25, 4, 25.03, 4.23),
    "resnext101_32x4d": (43, 8, 44.18, 7.97),
    "resnext101_32x8d": (88, 16, 88.79, 16.41),
    "resnext101_32x16d": (193, 36, 194.03, 36.16),
    # The multiply-adds are from table 6 of Mahajan et al. 2018 (arXiv:1805.00932).
    "resnext101_32x48d": (829, 153, 828.41, 153.31),
}
CLIPS = {
    ("r2plus1d_18", 8): (33, 21, 33.37, 20.75),
    ("r2plus1d_18", 32): (33, 83, 33.37, 82.99),
    ("r2plus1d_34", 8): (64, 38, 63.70, 38.09),
    # The paper does not have the multiply-adds of this teacher.
    ("r2plus1d_34", 32): (64, None, 63.70, 152.36),
}


def count_parameters_and_operations(name: str, classes: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """Count the parameters and the multiply-adds of a network without storage.

    Args:
        name: The name of the network.
        classes: The number of classes.
        shape: The shape of the input, with the batch.

    Returns:
        Parameters in millions and multiply-adds in billions.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = networks.build_model(name, classes).eval()
        network(torch.empty(shape))
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6, counter.get_total_flops() / 2e9


def assert_published(counts: tuple[float, float], expected: tuple[int | None, int | None, float, float]) -> None:
    assert counts == pytest.approx(expected[2:], abs=0.005)
    for count, published in zip(counts, expected[:2], strict=True):
        assert published is None or abs(count - published) <= max(0.03 * published, 0.5)


@pytest.mark.parametrize("name", IMAGES)
def test_image_networks_have_the_published_size(name: str) -> None:
    assert_published(count_parameters_and_operations(name, 1000, (1, 3, 224, 224)), IMAGES[name])


@pytest.mark.parametrize(("name", "frames"), CLIPS)
def test_video_networks_have_the_published_size(name: str, frames: int) -> None:
    assert_published(count_parameters_and_operations(name, 400, (1, 3, frames, 112, 112)), CLIPS[name, frames])


def test_every_name_of_torchvision_is_known_and_no_other() -> None:
    from torchvision import models

    own = {name for name, entry in registry.REGISTRY.items() if entry.family != "torchvision"}
    listed = set(models.list_models(module=models))
    assert {name for name, entry in registry.REGISTRY.items() if entry.family == "torchvision"} == listed - own


@pytest.mark.parametrize(
    "name", ["resnet8_small", "squeezenet1_1", "mobilenet_v3_small", "regnet_y_400mf", "googlenet", "timm/resnet10t"]
)
def test_a_network_gives_logits_and_its_head_is_detected(name: str) -> None:
    network = networks.build_model(name, 7, resolution=64).eval()
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits_BC = network(images_BCHW)
        assert logits_BC.shape == (2, 7)
        heads = networks.head_parameter_names(name, 7, 64)
        assert {network.get_parameter(head).shape[0] for head in heads} == {7}
        assert torch.equal(networks.run_head_in_fp32(network, heads)(images_BCHW), logits_BC)


def test_under_autocast_the_logits_are_of_full_precision() -> None:
    name = "mobilenet_v3_small"
    network = networks.run_head_in_fp32(
        networks.build_model(name, 7, 64), networks.head_parameter_names(name, 7, 64)
    ).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert network(torch.rand(2, 3, 64, 64)).dtype == torch.float32


def test_finding_a_head_does_not_change_the_random_state() -> None:
    torch.manual_seed(0)
    networks.head_parameter_names("regnet_y_400mf", 7)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_a_transformer_is_built_for_the_runs_resolution() -> None:
    with torch.device("meta"):
        tokens = networks.build_model("vit_b_32", 2, resolution=96).get_parameter("encoder.pos_embedding")
    assert tokens.shape[1] == 1 + (96 // 32) ** 2


@pytest.mark.parametrize(
    ("name", "resolution", "line"),
    [
        ("resnet5O", 224, r"^architecture: .*'resnet5O'.*'resnet50'.*SEMI-E151"),
        ("efficientnetb0", 224, r"'efficientnet_b0'.*SEMI-E151"),
        ("zzz", 224, r"'zzz'.*alexnet, .*….*SEMI-E151"),
        ("timm/resnet1O", 224, r"'timm/resnet1O'.*'timm/resnet18'.*SEMI-E151"),
        ("inception_v3", 32, r"^inception_v3: .*SEMI-E142"),
        ("vit_b_16", 100, r"^vit_b_16: .*SEMI-E142"),
        ("timm/vit_tiny_patch16_224", 64, r"SEMI-E142"),
    ],
)
def test_an_impossible_network_is_refused_in_one_line(name: str, resolution: int, line: str) -> None:
    with pytest.raises(InvalidInputError, match=line) as refusal:
        networks.build_model(name, 3, resolution)
    assert "\n" not in str(refusal.value)


def test_names_are_checked_without_torch() -> None:
    script = (
        "import sys; sys.modules['torchvision'] = None; from semiscale.models import registry as a\n"
        "a.get_architecture('efficientnet_b0'); a.get_architecture('resnet50'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"
