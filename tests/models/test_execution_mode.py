"""Test execution modes: timing on the CPU, and compilation over ranks that are real processes."""

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


def small() -> nn.Module:
    """Return a network that compiles in seconds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@compiles
@pytest.mark.slow
def test_what_is_compiled_is_timed_and_taken_where_it_pays(capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
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


def test_a_step_of_sgd_is_a_handful_of_calls(tmp_path: Path) -> None:
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


def gradients() -> tuple[bool, list[list[float]]]:
    """Return whether the compiled network averages gradients, and the gradient of two microbatches."""
    ranks = distributed_context_from_env()
    with ranks.process_group(False):
        first = ranks.broadcast_ddp_wrapper(of_the_first=True)
        # Only rank 0 runs this network, and it waits for no other rank.
        if ranks.is_main:
            F.cross_entropy(first(small())(images(2)), torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
        network = ExecutionMode(layout=CONTIGUOUS, compiled=True, on="").wrap(small(), ranks.broadcast_ddp_wrapper())
        inner = getattr(network, "_orig_mod", network)
        images_BCHW, labels_B = images(8)[ranks.batch_slice(8)], torch.arange(8)[ranks.batch_slice(8)] % 5
        with network.no_sync():  # type: ignore[operator]
            (F.cross_entropy(network(images_BCHW[:2]), labels_B[:2]) / 2).backward()  # type: ignore[no-untyped-call]
        (F.cross_entropy(network(images_BCHW[2:]), labels_B[2:]) / 2).backward()  # type: ignore[no-untyped-call]
        found = [parameter.grad.flatten().tolist() for parameter in network.parameters() if parameter.grad is not None]
        return isinstance(inner, DistributedDataParallel), found


def images(count: int) -> torch.Tensor:
    """Return the same images on every rank."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@compiles
@pytest.mark.slow
def test_the_ranks_compile_what_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel is compiled with the network, and the averaged gradient is that of the whole batch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        run_id="speed", monitor_interval=0.1, start_method="spawn",
    )  # fmt: skip
    of_ranks = elastic_launch(launch, gradients)()
    model = small()
    F.cross_entropy(model(images(8)), torch.arange(8) % 5).backward()  # type: ignore[no-untyped-call]
    whole = [parameter.grad.flatten().tolist() for parameter in model.parameters() if parameter.grad is not None]
    for averages, found in of_ranks.values():
        assert averages
        assert len(found) == len(whole) == 4
        for one, expected in zip(found, whole, strict=True):
            assert one == pytest.approx(expected, abs=1e-6)
