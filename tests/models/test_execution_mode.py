"""Test execution modes: timing on the CPU, and compilation on several ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from semiscale.models import execution_mode, networks
from semiscale.models.execution_mode import CONTIGUOUS, ExecutionMode
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.distributed import DistributedContext, distributed_context_from_env
from semiscale.stages.train.train_state import build_optimizer
from tests.stages.train.test_model_ema import Calls

compiles = pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
ALONE = DistributedContext().broadcast_ddp_wrapper()


def build_small_network() -> nn.Module:
    """Return a network that compiles in seconds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@compiles
@pytest.mark.slow
def test_a_compiled_step_is_timed_and_used_only_if_it_pays(capsys: pytest.CaptureFixture[str]) -> None:
    model = build_small_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images_BCHW = torch.rand(4, 3, 8, 8)
    assert not execution_mode.autotune_training(model, images_BCHW, 1, ALONE).compiled, (
        "a step cannot win back a compilation"
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert "a step of 4 images: contiguous" in line
    assert "compiled" in line
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_of_sgd_has_few_calls(tmp_path: Path) -> None:
    """On a CPU a loop over 161 tensors is slower than their updates."""
    config = TrainConfig(
        workdir=str(tmp_path), recipe="modern", architecture="resnet50", plan="", resolution=64, augmentation="shift"
    )
    model = networks.build_model("resnet50", 10)
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    # The first step creates the momenta.
    optimizer.step()
    with Calls() as calls:  # type: ignore[no-untyped-call]
        optimizer.step()
    # There are two groups: weights that decay, and normalization layers that do not.
    assert calls.count <= 4


def train_on_rank() -> tuple[bool, list[list[float]]]:
    """Return whether the network averages gradients, and those of two microbatches."""
    ranks = distributed_context_from_env()
    with ranks.process_group(False):
        first = ranks.broadcast_ddp_wrapper(of_the_first=True)
        # Only rank 0 runs this network, and it waits for no other rank.
        if ranks.is_main:
            F.cross_entropy(first(build_small_network())(draw_images(2)), torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
        network = ExecutionMode(layout=CONTIGUOUS, compiled=True, on="").wrap(
            build_small_network(), ranks.broadcast_ddp_wrapper()
        )
        inner = getattr(network, "_orig_mod", network)
        images_BCHW, labels_B = draw_images(8)[ranks.batch_slice(8)], torch.arange(8)[ranks.batch_slice(8)] % 5
        with network.no_sync():  # type: ignore[operator]
            (F.cross_entropy(network(images_BCHW[:2]), labels_B[:2]) / 2).backward()  # type: ignore[no-untyped-call]
        (F.cross_entropy(network(images_BCHW[2:]), labels_B[2:]) / 2).backward()  # type: ignore[no-untyped-call]
        gradients = [
            parameter.grad.flatten().tolist() for parameter in network.parameters() if parameter.grad is not None
        ]
        return isinstance(inner, DistributedDataParallel), gradients


def draw_images(count: int) -> torch.Tensor:
    """Draw the same images on every rank."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@compiles
@pytest.mark.slow
def test_compiled_ranks_average_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel is compiled with the network.

    The averaged gradient equals the gradient of the whole batch.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        run_id="speed", monitor_interval=0.1, start_method="spawn",
    )  # fmt: skip
    results = elastic_launch(launch, train_on_rank)()
    model = build_small_network()
    F.cross_entropy(model(draw_images(8)), torch.arange(8) % 5).backward()  # type: ignore[no-untyped-call]
    whole = [parameter.grad.flatten().tolist() for parameter in model.parameters() if parameter.grad is not None]
    for is_averaged, gradients in results.values():
        assert is_averaged
        assert len(gradients) == len(whole) == 4
        for gradient, expected in zip(gradients, whole, strict=True):
            assert gradient == pytest.approx(expected, abs=1e-6)
