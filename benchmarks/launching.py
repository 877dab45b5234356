"""What decoding costs the thread that launches kernels: beside it in threads, as on a CPU, or in another process.

    python -m benchmarks.launching

A training step on a GPU is a few hundred small calls from one Python thread. Here the calls do next to nothing, on one
core, while another decodes the photographs that a training would see: by TrainingData in this process, by the same in a
process of its own (components/train/feed.py), or not at all. The three take turns of a second.
"""

import argparse
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

from benchmarks.turns import by_turns, wait_for_go

PHOTOS = Path("../shared/data/photos")
BATCH, LAYERS = 24, 150
MANNERS = ("nothing", "threads", "process")


def contest(manner: str, photos: Path) -> None:
    """Be one contestant: print the steps and the images so far every ten steps."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import torch

    from components.shared import shards as sharding
    from components.shared.receipts import Preprocessing
    from components.shared.shards import Columns
    from components.shared.splits import LabeledShard
    from components.train import data as training_data
    from components.train.feed import made_beside
    from components.train.ranks import Ranks

    vars(training_data)["cores"] = lambda: 1
    listed = sharding.find([str(photos)])
    sizes = [len(list(sharding.read(shard, Columns()))) for shard in listed]
    labeled = [LabeledShard(shard, np.zeros(size, np.int32)) for shard, size in zip(listed, sizes, strict=True)]
    preprocessing = Preprocessing(resolution=224, augmentation="crop-flip")
    data = training_data.TrainingData(labeled, Columns(), preprocessing, 0, Ranks())
    seen = 0

    def take() -> None:
        nonlocal seen
        for batch in made_beside(data, BATCH, 10**6, 0) if manner == "process" else data.batches(BATCH, 10**6):
            seen += len(batch.keys)

    network = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(LAYERS)])
    input_BC = torch.zeros(1, 8)
    wait_for_go()
    if manner != "nothing":
        threading.Thread(target=take, daemon=True).start()
        while not seen:
            time.sleep(0.01)
    for steps in itertools.count():
        network(input_BC).sum().backward()
        network.zero_grad(set_to_none=True)
        if steps % 10 == 0:
            print(steps, seen, flush=True)


def main() -> None:
    """Print milliseconds a step and images a second of each, and the ratios as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of tars with JPEG files")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--contestant", choices=MANNERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contest(arguments.contestant, arguments.photos)
        return
    command = [sys.executable, "-m", "benchmarks.launching", "--photos", str(arguments.photos), "--contestant"]
    printed = by_turns({manner: [*command, manner] for manner in MANNERS}, arguments.seconds)
    step_ms = {}
    for manner, lines in printed.items():
        (first_s, first), (last_s, last) = lines[len(lines) // 10], lines[-1]
        (steps_0, images_0), (steps, images) = (tuple(map(int, line.split())) for line in (first, last))
        step_ms[manner] = 1e3 * (last_s - first_s) / (steps - steps_0)
        print(f"{manner:8} {step_ms[manner]:6.2f} ms a step, {(images - images_0) / (last_s - first_s):6.0f} images/s")
    print(
        json.dumps({f"step_beside_{manner}": round(step_ms[manner] / step_ms["nothing"], 2) for manner in MANNERS[1:]})
    )


if __name__ == "__main__":
    main()
