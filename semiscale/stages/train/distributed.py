"""The ranks of one training: their context, their collectives, and their launch on one machine.

`torchrun … -m -- semiscale.stages.train …` starts ranks on any number of machines. Without the dashes torchrun would
read the stage's `--start` as an option of its own. On a single machine the stage itself starts one rank for each GPU.
"""

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
from semiscale.common.prctl import set_parent_death_signal
from semiscale.common.signals import TerminatedError
from semiscale.observability import prometheus
from semiscale.stages.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

# The other ranks wait this long, because rank 0 validates and writes checkpoints alone.
PROCESS_GROUP_TIMEOUT = timedelta(hours=1)
# Time that torchrun gives its ranks to stop before it kills them. Its default of 30 s is too short for the checkpoint
# of the paper's largest network, which has 6.6 GB. The time must be shorter than the grace period of a node
# (manifests/components/trainjobs).
SHUTDOWN_TIMEOUT_S = 110
# Environment variable of torchrun that sets this time.
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process and its collectives.

    Every rank must call a collective, because it waits for all ranks.

    Attributes:
        rank: Rank of this process.
        count: World size.
        local_rank: Rank of this process on its machine.
        local_count: Ranks on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0, the only rank that writes."""
        return self.rank == 0

    def batch_slice(self, batch_size: int) -> slice:
        """Return this rank's slice of a global batch. The slices of all ranks in order make up the batch."""
        return slice(self.rank * batch_size // self.count, (self.rank + 1) * batch_size // self.count)

    @contextmanager
    def process_group(self, on_gpu: bool) -> Iterator[None]:
        """Join the process group for the time of the block. A single rank needs no group."""
        if self.count == 1:
            yield
            return
        from torch import distributed

        # On GPUs the group has Gloo, too: the flags that are all-reduced at every step must not wait for the device.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def all_reduce_any_async(self, flag: bool) -> Callable[[], bool]:
        """All-reduce whether the flag is set on any rank, without waiting for the result.

        Args:
            flag: The flag of this rank.

        Returns:
            A function that waits for the result and returns it.
        """
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
        """Return a wrapper of networks that averages gradients over the ranks.

        A single rank gets a wrapper that returns the network itself. Every rank must call this method, because a
        process group of some ranks is created by all ranks. The returned function broadcasts the weights of rank 0.

        Args:
            of_the_first: Whether the wrapper averages over rank 0 only. Rank 0 then times the steps that all ranks
                will make, and does not wait for the others.

        Returns:
            The wrapper.
        """
        if self.count == 1:
            return lambda network: network
        import torch
        from torch import distributed
        from torch.nn.parallel import DistributedDataParallel

        # The strides of a 1x1 convolution are ambiguous. Both ways to write them describe the same memory.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        group = distributed.new_group([0]) if of_the_first else None

        def wrap(network: "nn.Module") -> "nn.Module":
            on_gpu = next(network.parameters()).is_cuda
            return DistributedDataParallel(
                network,
                device_ids=[torch.cuda.current_device()] if on_gpu else None,
                process_group=group,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
            )

        return wrap

    def all_reduce_mean(self, value: "Tensor") -> "Tensor":
        """All-reduce a scalar on a device and return its mean over the ranks."""
        if self.count == 1:
            return value
        from torch import distributed

        value = value.clone()
        distributed.all_reduce(value)
        return value / self.count

    def all_reduce_min(self, number: int) -> int:
        """All-reduce a number and return the smallest one of all ranks."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        numbers = torch.tensor([number])
        distributed.all_reduce(numbers, distributed.ReduceOp.MIN)
        return int(numbers.item())

    def broadcast_from_main(self, value: Any) -> Any:
        """Broadcast the value of rank 0, which may be any picklable object, and return it on every rank."""
        if self.count == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]


def distributed_context_from_env() -> DistributedContext:
    """Read the context of this process from torchrun's variables. Without torchrun the world size is 1."""
    return DistributedContext(
        rank=int(os.environ.get("RANK", 0)),
        count=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def is_under_torchrun() -> bool:
    """Tell whether torchrun started this process."""
    return "RANK" in os.environ


def exit_with_launcher() -> None:
    """Make the kernel send SIGTERM to this rank when its launcher ends, even by kill -9.

    Without that the rank would continue on a device that the next start of the training needs. Other systems than Linux
    have no prctl(2), and the rank does continue there.
    """
    set_parent_death_signal(signal.SIGTERM)


def local_device_count() -> int:
    """Return the number of visible GPUs, or 1 (the CPU) if there is none."""
    import torch

    return max(torch.cuda.device_count(), 1)


def launch_local_ranks(config: TrainConfig, count: int) -> None:
    """Start the ranks of a training on this machine and wait until they end.

    Each rank is a process and logs the reason when it fails. The exit code of the first rank that failed decides which
    error is raised.

    Args:
        config: The training.
        count: Number of ranks.

    Raises:
        InvalidInputError: A rank rejected its input.
        TerminatedError: SIGTERM stopped the training.
        SemiscaleError: A rank failed.
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
    # Leave the port of the metrics to rank 0, which knows the progress.
    prometheus.stop_serving()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.model_dump().items()]
    try:
        elastic_launch(launch, sys.executable)("-m", "semiscale.stages.train", *options)
    except SignalException:
        raise TerminatedError(
            "SEMI-E002",
            "train: SIGTERM stopped the training. Its checkpoint is saved. Start the training again to continue.",
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        kinds = {kind.exit_code: kind for kind in (InvalidInputError, TerminatedError)}
        raise kinds.get(failure.exitcode, SemiscaleError)(
            "SEMI-E248",
            f"train: Rank {rank} of {count} stopped with exit code {failure.exitcode}. See that rank's line above.",
        ) from None
