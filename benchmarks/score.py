"""The scan against its limits and its rivals: the bare model, the bare decoder, Ray Data, and a DataLoader script.

    make bench-score

The scan is the real stage, from claims to sealed units, on WebDataset tars of photographs. It is measured where the
model is the limit and where decoding is. The rivals run the same network on the same tars, in the best form that we
could write: torchvision's decoder and resize, uint8 batches, as many workers as there are cores. Contestants take
turns, several times; the figures are medians.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from components.plan import ledger
from components.score import forward
from components.score.forward import Best
from components.score.score import ScoreConfig, score
from components.shared import models
from components.shared.decode import Pixels, decode
from components.shared.preprocess import Batch, fixed_cut
from components.shared.receipts import PlanReceipt, Preprocessing, Receipt, Split, TrainReceipt
from components.shared.shards import Columns

PHOTOS = Path("../shared/data/photos")
CLASSES, KEPT = 1000, 10
BATCH = 64 if not torch.cuda.is_available() else 256  # of the rivals
CORES = os.cpu_count() or 1
NOTHING = Split(digest="", index="", shards="", samples=0, class_counts=[])


@dataclass(frozen=True)
class Case:
    """What is scanned with what: a network at a resolution over so many images."""

    limit: str
    architecture: str
    resolution: int
    augmentation: str
    images: int

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network sees."""
        return Preprocessing(resolution=self.resolution, augmentation=self.augmentation)


# On a CPU the model works on the cores that decode: only a tiny one leaves the limit to decoding.
ON_CPU = [Case("model", "resnet50", 224, "crop-flip", 768), Case("decoder", "resnet8_small", 16, "shift", 12_800)]
ON_GPU = [
    Case("model", "resnet50", 224, "crop-flip", 25_600),
    Case("model", "resnext101_32x16d", 224, "crop-flip", 12_800),
    Case("decoder", "resnet18", 224, "crop-flip", 12_800),
]


def photographs(folder: Path) -> list[bytes]:
    """Return the JPEG files of a folder's tars, or, where there is none, cuts of scikit-learn's two photographs."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        return list(cuts(400))
    return [data for path in tars for data in members(path)]


def members(path: Path) -> Iterator[bytes]:
    """Yield the JPEG files of a tar."""
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file and member.name.lower().endswith((".jpg", ".jpeg")):
                yield file.read()


def cuts(number: int) -> Iterator[bytes]:
    """Yield JPEG files of 500 x 375 pixels, random places of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for photograph in islice(cycle(load_sample_images().images), number):
        top, left = rng.integers(photograph.shape[0] - 375), rng.integers(photograph.shape[1] - 500)
        buffer = io.BytesIO()
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(buffer, "JPEG", quality=95)
        yield buffer.getvalue()


class Bench:
    """One case on this machine: its tars, its network, and a run of each contestant."""

    def __init__(self, case: Case, photos: list[bytes], folder: Path) -> None:
        self.case, self.photos, self._folder = case, photos, folder
        self.device = models.device()
        self._runs = 0

    @cached_property
    def tars(self) -> list[str]:
        """The pool: whole batches, so that none is scored that is not full."""
        pool = self._folder / "pool"
        pool.mkdir(parents=True)
        images = islice(cycle(self.photos), self.case.images)
        while batch := list(islice(images, 256)):
            with tarfile.open(pool / f"{len(list(pool.iterdir())):06}.tar", "w") as tar:
                for number, data in enumerate(batch):
                    member = tarfile.TarInfo(f"{number:06}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return [str(path) for path in sorted(pool.iterdir())]

    @cached_property
    def checkpoint(self) -> str:
        """A network with random weights: as fast as a trained one."""
        torch.manual_seed(0)
        description = models.Description(
            architecture=self.case.architecture,
            classes=[str(number) for number in range(CLASSES)],
            preprocessing=self.case.preprocessing,
            recipe="teacher",
            digest="0",
        )
        return models.save(models.build(self.case.architecture, CLASSES), description, str(self._folder))

    @cached_property
    def scorer(self) -> forward.OnCpu | forward.OnGpu:
        """The network on its device, as the scan uses it, after a first batch, for which libraries make their plans."""
        model = models.read(self.checkpoint)[0]
        scorer = forward.on(self.device, model, self.case.preprocessing, KEPT, str(self._folder))
        size = self.case.resolution
        scorer.start(scorer.allocate((scorer.batch_size, size, size, 3)))()
        return scorer

    @cached_property
    def in_turn(self) -> Callable[[Batch], Best]:
        """The network as a script calls it."""
        best = called_in_turn(self.checkpoint, self.case)
        best(np.zeros((BATCH, self.case.resolution, self.case.resolution, 3), np.uint8))
        return best

    def scan(self) -> float:
        """Run the score stage in a fresh workdir; returns its seconds, reading the checkpoint included."""
        self._runs += 1
        config = self._config(self._folder / f"run-{self._runs}")
        # Before the clock runs, this process has seen a first batch, and has what Ray brings and the images have not:
        # where there is pandas, pyarrow loads it at its first use.
        assert self.scorer
        import_module("pandas")
        started = time.monotonic()
        receipt = score(config)
        seconds = time.monotonic() - started
        assert receipt.scored == self.case.images
        return seconds

    def _config(self, workdir: Path) -> ScoreConfig:
        units = ledger.draw_up(self.tars, str(workdir), Columns("image", ""))
        (workdir / "units.json").write_text(json.dumps([unit.model_dump() for unit in units]))
        classes = [str(number) for number in range(CLASSES)]
        common = {"digest": "0", "folder": str(workdir), "seconds": 0.0}
        plan = PlanReceipt(
            stage="plan", name="bench", pool_digest="", classes=classes, train=NOTHING, validation=NOTHING,
            test=NOTHING, units=str(workdir / "units.json"), shards=len(self.tars), pods=1, classes_per_image=KEPT,
            size_bytes=sum(Path(tar).stat().st_size for tar in self.tars), failed={}, failures=[], notes=[], run={},
            **common,
        )  # fmt: skip
        teacher = TrainReceipt(
            stage="train", recipe="teacher", architecture=self.case.architecture, checkpoint=self.checkpoint,
            parameters=0, classes=classes, preprocessing=self.case.preprocessing, images_processed=0, samples=0,
            learning_rate=0.0, validation_top1=0.0, curve=[], images_per_s=0.0, **common,
        )  # fmt: skip

        def written(receipt: Receipt) -> str:
            path = workdir / f"{receipt.stage}.json"
            path.write_text(receipt.model_dump_json())
            return str(path)

        return ScoreConfig(
            workdir=str(workdir), plan=written(plan), teacher=written(teacher), pod=0, images_per_class=100
        )

    def bare_model(self) -> float:
        """Score decoded batches that lie in memory, as many as the pool has."""
        size = self.scorer.batch_size
        batch_BHWC = self.scorer.allocate((size, self.case.resolution, self.case.resolution, 3))
        batch_BHWC[:] = [self._cut(data) for data in islice(cycle(self.photos), size)]
        self.scorer.start(batch_BHWC)()
        started = time.monotonic()
        computing: deque[Callable[[], Best]] = deque()
        for _ in range(-(-self.case.images // size)):
            computing.append(self.scorer.start(batch_BHWC))
            if len(computing) == self.scorer.in_flight:
                computing.popleft()()
        for result in computing:
            result()
        return time.monotonic() - started

    def bare_decoder(self) -> float:
        """Decode, resize and cut images that lie in memory, on all cores, and do nothing with them."""
        started = time.monotonic()
        with ThreadPoolExecutor(CORES, "decode", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(lambda data: self._cut(data).size, islice(cycle(self.photos), self.case.images)):
                pass
        return time.monotonic() - started

    def _cut(self, data: bytes) -> Pixels:
        return fixed_cut(decode(data), self.case.preprocessing)

    def dataloader(self) -> float:
        """A script around torch's DataLoader: worker processes read, decode and batch, the main process scores."""
        best = self.in_turn  # has seen a first batch, as in `scan`
        started = time.monotonic()
        loader = DataLoader(
            TarImages(self.tars, self.case), batch_size=BATCH, num_workers=CORES, prefetch_factor=4,
            pin_memory=self.device.type == "cuda", multiprocessing_context="fork",
        )  # fmt: skip
        scored = 0
        for images_BHWC in loader:
            labels_BP, _ = best(images_BHWC.numpy())
            scored += len(labels_BP)
        assert scored == self.case.images
        return time.monotonic() - started

    def ray_data(self) -> float:
        """A Ray Data pipeline: tasks read the tars and decode, an actor scores batches.

        Measured from the moment that the actor has loaded the network, for which Ray is made to wait: its start-up, ten
        seconds and more, would be nothing to a long scan.
        """
        import ray

        ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
        ray.data.DataContext.get_current().wait_for_min_actors_s = 600
        ray.data.DataContext.get_current().enable_progress_bars = False
        case, checkpoint = self.case, self.checkpoint
        images = ray.data.read_webdataset(self.tars, decoder=None)
        decoded = images.map(lambda row: {"image": torchvision_cut(row["jpg"], case).numpy()})
        found = decoded.map_batches(
            RayScorer, fn_constructor_args=(checkpoint, case), batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=1), num_gpus=1 if self.device.type == "cuda" else None,
            num_cpus=0.9,  # not what the decoding tasks ask for: else Ray decodes in the one actor
        )  # fmt: skip
        rows = list(found.iter_batches(batch_size=None))
        ended = time.time()
        assert sum(len(batch["labels"]) for batch in rows) == case.images
        ray.shutdown()
        return float(ended - rows[0]["ready"][0])


def called_in_turn(checkpoint: str, case: Case) -> Callable[[Batch], Best]:
    """Return the network as a script calls it: one batch after the other; on a CPU, all cores on each."""
    model, device = models.read(checkpoint)[0], models.device()
    if device.type == "cuda":
        on_gpu = forward.OnGpu(model, case.preprocessing, KEPT, device, str(Path(checkpoint).parent))
        return lambda images_BHWC: on_gpu.start(images_BHWC)()
    scorer = forward.Scorer(model, case.preprocessing, KEPT, bf16=False).eval()
    scorer.use(torch.channels_last)

    @torch.inference_mode()
    def best(images_BHWC: Batch) -> Best:
        found: Best = scorer(torch.from_numpy(images_BHWC))
        return found

    return best


def torchvision_cut(data: bytes, case: Case) -> torch.Tensor:
    """Decode and cut as torchvision's own transforms do: what a user would write. Returns uint8 HWC."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as F

    image_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    short = round(case.resolution * 256 / 224) if case.augmentation == "crop-flip" else case.resolution
    resized_CHW = F.resize(image_CHW, [short], antialias=True)
    cut_CHW: torch.Tensor = F.center_crop(resized_CHW, [case.resolution] * 2)
    return cut_CHW.permute(1, 2, 0).contiguous()


class TarImages(IterableDataset[torch.Tensor]):
    """The images of tars, every worker its share of the tars; where there are too few, its share of the images."""

    def __init__(self, tars: list[str], case: Case) -> None:
        self._tars, self._case = tars, case

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        assert worker is not None
        torch.set_num_threads(1)
        images = (data for tar in self._tars for data in members(Path(tar)))
        block = 64  # so that batches are full: neighbours go to one worker
        for number, data in enumerate(images):
            if number // block % worker.num_workers == worker.id:
                yield torchvision_cut(data, self._case)


class RayScorer:
    """The network in a Ray actor."""

    def __init__(self, checkpoint: str, case: Case) -> None:
        torch.set_num_threads(CORES)
        self._best = called_in_turn(checkpoint, case)
        self._ready = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        labels_BP, scores_BP = self._best(np.ascontiguousarray(batch["image"]))
        ready = np.full(len(labels_BP), self._ready)
        return {"labels": labels_BP.numpy(), "scores": scores_BP.numpy(), "ready": ready}


def measured(bench: Bench, rounds: int) -> dict[str, float]:
    """Run the contestants in turns; returns the median images a second of each."""
    contestants: dict[str, Callable[[], float]] = {
        "scan": bench.scan,
        f"bare {bench.case.limit}": bench.bare_model if bench.case.limit == "model" else bench.bare_decoder,
        "DataLoader": bench.dataloader,
        "Ray Data": bench.ray_data,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(run())
    rates = {name: bench.case.images / statistics.median(taken) for name, taken in seconds.items()}
    case = bench.case
    print(f"\n{case.architecture} at {case.resolution}, {case.images:,} images: {case.limit}-bound")
    for name, rate in rates.items():
        each = ", ".join(f"{bench.case.images / one:.1f}" for one in seconds[name])
        print(f"{name:14}{rate:10.1f}/s   scan / it {rates['scan'] / rate:5.2f}   runs {each}", flush=True)
    return rates


def machine() -> str:
    """Return the processor, cores, card and versions in one line."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [f"{name} {version(name)}" for name in ("torch", "torchvision", "simplejpeg", "ray")]
    cores = f"{CORES} cores, {card}, load {os.getloadavg()[0]:.1f}"
    return ", ".join([names[0].partition(": ")[2], cores, f"Python {platform.python_version()}", *parts])


def main() -> None:
    """Measure every case, and print the ratios as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of tars with JPEG files")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    models.set_up()
    photos = photographs(arguments.photos)
    print(f"{machine()}\n{len(photos)} photographs, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB on average")
    ratios: dict[str, list[float]] = {}
    for case in ON_GPU if torch.cuda.is_available() else ON_CPU:
        with tempfile.TemporaryDirectory() as folder:
            rates = measured(Bench(case, photos, Path(folder)), arguments.rounds)
        for name, rate in rates.items():
            ratios.setdefault(name.lower().replace(" ", "_"), []).append(rates["scan"] / rate)
    # Of a contestant in several cases, the one where the scan gains least.
    print(json.dumps({f"ratio_to_{name}": round(min(of), 3) for name, of in ratios.items() if name != "scan"}))


if __name__ == "__main__":
    main()
