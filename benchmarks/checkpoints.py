"""Measure what checkpoints cost a training, and how much work a killed training loses.

    python -m benchmarks.checkpoints [--architecture resnet50] [--steps 10]

The training steps on one batch in memory. It steps without a checkpoint, and then with one that is written meanwhile,
several times in turn. The cost of a checkpoint is the difference. The checkpoints go to a folder on this machine's
disk, so a remote store adds the time of its upload to the time of a write. The last line gives the same figures for
the paper's largest network, by its size and the measured rates. It assumes a GPU, which waits for the copy alone.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.machine import describe_gpu, describe_machine
from benchmarks.train_contestants import CLASSES, build_train_step
from semiscale.models import networks
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress
from semiscale.stages.train.checkpoint_writer import MAX_COST, CheckpointWriter
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.input_pipeline.device_loader import DeviceBatch

LARGEST = "resnext101_32x48d"
TURNS = 5


def state_bytes(architecture: str) -> int:
    """Return the size of a checkpoint: weights, running statistics and momenta."""
    with torch.device("meta"):
        model = networks.build_model(architecture, CLASSES)
    tensors = [*model.state_dict().values(), *model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def time_steps(step: Callable[[], object], count: int) -> float:
    """Return the seconds of some steps."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - started


def describe(name: str, size_bytes: int, copy_s: float, cost_s: float, write_s: float, interval_s: float) -> str:
    """Return one line of the result.

    Args:
        name: Name of the network.
        size_bytes: Size of a checkpoint.
        copy_s: Seconds for which the training waits.
        cost_s: Seconds that a checkpoint adds to the steps while it is written, the copy included.
        write_s: Seconds of writing.
        interval_s: Seconds between two checkpoints.
    """
    return (
        f"{name}: {size_bytes / 1e9:.2f} GB, copy {copy_s:.2f} s, cost {cost_s:.2f} s, write {write_s:.1f} s, every "
        f"{interval_s:.0f} s: {cost_s / interval_s:.2%} of the time, at most {interval_s + write_s:.0f} s lost"
    )


def main() -> None:
    """Measure, and print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device-batch-size", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--steps", type=int, default=4, help="steps while a checkpoint is written")
    options = parser.parse_args()
    training = build_train_step(options)
    device = training._device
    shape = (options.batch_size, options.resolution, options.resolution, 3)
    batch = DeviceBatch(
        torch.randint(0, 255, shape, dtype=torch.uint8, device=device),
        (torch.arange(options.batch_size) % CLASSES).to(device),
        [],
    )
    minutes: float = TrainConfig.model_fields["checkpoint_minutes"].default
    print(describe_machine(describe_gpu(), "torch"), flush=True)

    def step() -> float:
        return float(training.all_reduce_step(batch, 0.01, 1).item())

    time_steps(step, 2)
    copies, costs, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(CheckpointManager(folder), "benchmark", 60 * minutes, shares_cpu=device.type == "cpu")
        for turn in range(TURNS):
            alone_s = time_steps(step, options.steps)
            progress = TrainerProgress(step=turn, images_processed=turn, ranks=1, seconds=0.0, curve=[])
            started = time.perf_counter()
            writer.save(progress, training._state.state_dict())
            copies.append(time.perf_counter() - started)
            with_s = copies[-1] + time_steps(step, options.steps)
            writer.wait()
            writes.append(writer.write_s)
            costs.append(with_s - alone_s)
            print(f"{options.steps} steps {alone_s:.2f} s, with a checkpoint {with_s:.2f} s", flush=True)
        interval_s = writer.interval_s
    size, largest = state_bytes(options.architecture), state_bytes(LARGEST)
    copy_s, cost_s, write_s = median(copies), max(median(costs), median(copies)), median(writes)
    print(describe(options.architecture, size, copy_s, cost_s, write_s, interval_s))
    ratio = largest / size
    interval_s = max(60 * minutes, copy_s * ratio / MAX_COST)
    name = f"{LARGEST} on a GPU, by arithmetic"
    print(describe(name, largest, copy_s * ratio, copy_s * ratio, write_s * ratio, interval_s))


if __name__ == "__main__":
    main()
