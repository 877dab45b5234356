"""The processes of one training: which one this is, what they tell each other, and how one starts them on its devices.

`torchrun … -m -- semiscale.stages.train …` starts them on any number of machines (without the dashes torchrun takes our
--start for an option of its own); on a single machine the stage starts one for every device by itself.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from semiscale.common.cpu import available_cpus
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.common.signals import TerminatedError
from semiscale.observability import prometheus
from semiscale.stages.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

PROCESS_GROUP_TIMEOUT = timedelta(hours=1)  # for the others: rank 0 validates and writes checkpoints alone
# How long torchrun leaves its ranks to stop before it kills them; 30 s where nothing is said, and a checkpoint of the
# paper's largest network is 6.6 GB. Less than the grace period of a node (manifests/components/trainjobs).
SHUTDOWN_TIMEOUT_S = 110
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class DistributedContext:
    """This process among those of its training. `local` counts on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        """Say whether this is the rank that writes."""
        return self.rank == 0

    def batch_slice(self, batch_size: int) -> slice:
        """Return the places of a global batch that are this rank's: neighbours, so that the ranks make up the batch."""
        return slice(self.rank * batch_size // self.count, (self.rank + 1) * batch_size // self.count)

    @contextmanager
    def process_group(self, on_gpu: bool) -> Iterator[None]:
        """Join the other ranks for the time of the block; alone, there is nobody to join."""
        if self.count == 1:
            yield
            return
        from torch import distributed

        # Gloo as well on GPUs: what is agreed on at every step must not wait for the device.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def all_reduce_any_async(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any rank; calling what is returned waits for the answer."""
        if self.count == 1:
            return lambda: flag
        import torch
        from torch import distributed

        flags = torch.tensor([int(flag)])
        work = distributed.all_reduce(flags, distributed.ReduceOp.MAX, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(flags.item())

        return answer

    def broadcast_ddp_wrapper(self, of_the_first: bool = False) -> "Callable[[nn.Module], nn.Module]":
        """Return what wraps a network so that its gradients are averaged over the ranks; alone, nothing does.

        All ranks must ask. `of_the_first`: as it is done by all, but over rank 0 only, which then waits for nobody.
        """
        if self.count == 1:
            return lambda network: network
        import torch
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        # A 1x1 convolution's strides are ambiguous; the two ways to write them are the same memory.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        group = distributed.new_group([0]) if of_the_first else None

        def averaged(network: "nn.Module") -> "nn.Module":
            on_gpu = next(network.parameters()).is_cuda
            return DistributedDataParallel(
                network,
                device_ids=[torch.cuda.current_device()] if on_gpu else None,
                process_group=group,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

        return averaged

    def all_reduce_mean(self, value: "Tensor") -> "Tensor":
        """Return the mean over the ranks of a scalar on a device."""
        if self.count == 1:
            return value
        from torch import distributed

        value = value.clone()
        distributed.all_reduce(value)
        return value / self.count

    def all_reduce_min(self, number: int) -> int:
        """Return the smallest number that a rank has."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        numbers = torch.tensor([number])
        distributed.all_reduce(numbers, distributed.ReduceOp.MIN)
        return int(numbers.item())

    def broadcast_from_main(self, value: Any) -> Any:
        """Return what rank 0 has; waits for it."""
        if self.count == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]


def distributed_context_from_env() -> DistributedContext:
    """Read what torchrun says about this process; without it, a training is one process."""
    return DistributedContext(
        rank=int(os.environ.get("RANK", 0)),
        count=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def is_under_torchrun() -> bool:
    """Say whether this process is one of several, or the only one, that torchrun started."""
    return "RANK" in os.environ


def exit_with_launcher() -> None:
    """Have the kernel tell this rank to stop (SIGTERM) when the process that started it ends, even by kill -9.

    Else it would train on, on a device that the next start of the training needs. Where there is no Linux, it does.
    """
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def local_device_count() -> int:
    """Return how many GPUs this process may see; 1 where there is none, which is the CPU."""
    import torch

    return max(torch.cuda.device_count(), 1)


def launch_local_ranks(config: TrainConfig, count: int) -> None:
    """Train by `count` ranks on this machine, each a process of its own, and wait for them.

    Raises what stopped them: InvalidInputError, Stopped or SemiscaleError by the exit code of the first that failed,
    which has
    said why in a line of its own.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cpus() // count, 1)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id=config.digest(),
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    prometheus.stop_serving()  # to the first rank, which knows how far they are
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    try:
        elastic_launch(launch, sys.executable)("-m", "semiscale.stages.train", *options)
    except SignalException:
        raise TerminatedError(
            "SEMI-E002", "The training was stopped by SIGTERM. Its checkpoint is saved. Start it again to continue."
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        kinds = {kind.exit_code: kind for kind in (InvalidInputError, TerminatedError)}
        raise kinds.get(failure.exitcode, SemiscaleError)(
            "SEMI-E248",
            f"train: Rank {rank} of {count} stopped with exit code {failure.exitcode}. See its own line above.",
        ) from None
