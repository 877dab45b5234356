"""Compare scoring with the bare model, the bare decoder, Ray Data and a DataLoader.

    make bench-score

Scoring is the real stage, from leases to compacted shard groups, on WebDataset tars of photographs. It is measured
where the model is the limit and where decoding is. The others run the same network on the same tars, in the best form
that we could write: torchvision's decoder and resize, uint8 batches, as many workers as cores. Every contestant is
its own process. They take turns of a second, so that the machine's load affects all alike (benchmarks/turns.py).

Ray Data does not take turns, for its processes kept an eighth of their speed when they were stopped and resumed. It
runs alone, before and after the others, and its better run counts.
"""

import argparse
import io
import json
import os
import platform
import sys
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.turns import by_turns, wait_for_go
from semiscale.data.image_decoding import ImageArray, decode_image
from semiscale.data.labeled import LabeledSplit
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import Batch, center_crop
from semiscale.models import checkpoint_io, networks
from semiscale.models.checkpoint_metadata import CheckpointMetadata
from semiscale.models.execution_mode import DEFAULT_SCORING_MODE
from semiscale.receipts.base import Receipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.plan import shard_groups
from semiscale.stages.score import scorer as scoring
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.process_shard_loader import CPUS_PER_PROCESS
from semiscale.stages.score.scorer import Best
from semiscale.stages.score.stage import score

PHOTOS = Path("../shared/data/photos")
CLASSES, KEPT = 1000, 10
BATCH = 64 if not torch.cuda.is_available() else 256  # of the rivals
CORES = os.cpu_count() or 1
AT_MOST_S = 3600.0  # of a contestant's turns
NAMES = {"model": "bare_model", "decoder": "bare_decoder"}  # in the last line
NOTHING = LabeledSplit(digest="", index="", shards="", samples=0, class_counts=[])


Run = Callable[[], tuple[int, float]]


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
ON_CPU = [Case("model", "resnet50", 224, "crop-flip", 768), Case("decoder", "resnet8_small", 8, "shift", 25_600)]
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
    """One case on this machine: its tars and its network in a folder, and every contestant, prepared and then run.

    A contestant returns what it is to do; when that is done it returns the images that it has seen, and the seconds of
    its start-up that are not to count.
    """

    def __init__(self, case: Case, photos: list[bytes], folder: Path) -> None:
        self.case, self.photos, self._folder = case, photos, folder
        self.device = checkpoint_io.default_device()

    def write(self) -> None:
        """Write the pool, in whole batches, so that none is scored that is not full, and a network.

        Its weights are random: it is as fast as a trained one.
        """
        pool = self._folder / "pool"
        pool.mkdir(parents=True)
        images = islice(cycle(self.photos), self.case.images)
        while batch := list(islice(images, 256)):
            with tarfile.open(pool / f"{len(list(pool.iterdir())):06}.tar", "w") as tar:
                for number, data in enumerate(batch):
                    member = tarfile.TarInfo(f"{number:06}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        torch.manual_seed(0)
        description = CheckpointMetadata(
            architecture=self.case.architecture,
            classes=[str(number) for number in range(CLASSES)],
            preprocessing=self.case.preprocessing,
            recipe="teacher",
            digest="0",
        )
        checkpoint = checkpoint_io.save_model(
            networks.build_model(self.case.architecture, CLASSES), description, str(self._folder)
        )
        (self._folder / "checkpoint").write_text(checkpoint)

    @property
    def tars(self) -> list[str]:
        """The pool."""
        return [str(path) for path in sorted((self._folder / "pool").iterdir())]

    @property
    def checkpoint(self) -> str:
        """The network."""
        return (self._folder / "checkpoint").read_text()

    @cached_property
    def scorer(self) -> scoring.CpuScorer | scoring.GpuScorer:
        """The network on its device, as the scan uses it, after a first batch, for which libraries make their plans."""
        model = checkpoint_io.load_model(self.checkpoint)[0]
        scorer = scoring.make_scorer(self.device, model, self.case.preprocessing, KEPT, str(self._folder))
        size = self.case.resolution
        scorer.submit(np.zeros((scorer.batch_size, size, size, 3), np.uint8))()
        return scorer

    @cached_property
    def in_turn(self) -> Callable[[Batch], Best]:
        """The network as a script calls it."""
        best = called_in_turn(self.checkpoint, self.case)
        best(np.zeros((BATCH, self.case.resolution, self.case.resolution, 3), np.uint8))
        return best

    def scan(self) -> Run:
        """The score stage in a fresh workdir, reading the checkpoint included."""
        workdir = self._folder / "run"
        config = self._config(workdir)
        # Before the clock runs, this process has seen a first batch, and has what Ray brings and the images have not:
        # where there is pandas, pyarrow loads it at its first use.
        assert self.scorer
        import_module("pandas")
        return lambda: (score(config).scored, 0.0)

    def _config(self, workdir: Path) -> ScoreConfig:
        units = shard_groups.build_shard_groups(self.tars, str(workdir), SampleFields("image", ""))
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

    def model(self) -> Run:
        """The network on decoded batches that lie in memory, as many as the pool has."""
        size = self.scorer.batch_size
        batch_BHWC = np.stack([self._cut(data) for data in islice(cycle(self.photos), size)])
        self.scorer.submit(batch_BHWC)()
        batches = -(-self.case.images // size)

        def run() -> tuple[int, float]:
            computing: deque[Callable[[], Best]] = deque()
            for _ in range(batches):
                computing.append(self.scorer.submit(batch_BHWC))
                if len(computing) == self.scorer.in_flight:
                    computing.popleft()()
            for result in computing:
                result()
            return batches * size, 0.0

        return run

    def decoder(self) -> Run:
        """Decoding, resizing and cutting images that lie in memory, on all cores, in as many processes as a GPU's feed
        has; nothing is done with them.
        """
        processes = max(CORES // CPUS_PER_PROCESS, 1)
        share = -(-self.case.images // processes)

        def run() -> tuple[int, float]:
            decoding = [get_context("fork").Process(target=self._decode, args=(share,)) for _ in range(processes)]
            for process in decoding:
                process.start()
            for process in decoding:
                process.join()
            return sum(share for process in decoding if process.exitcode == 0), 0.0

        return run

    def _decode(self, images: int) -> None:
        with ThreadPoolExecutor(min(CORES, CPUS_PER_PROCESS), "decode", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(lambda data: self._cut(data).size, islice(cycle(self.photos), images)):
                pass

    def _cut(self, data: bytes) -> ImageArray:
        return center_crop(decode_image(data), self.case.preprocessing)

    def dataloader(self) -> Run:
        """A script around torch's DataLoader: worker processes read, decode and batch, the main process scores."""
        best = self.in_turn  # has seen a first batch, as in `scan`

        def run() -> tuple[int, float]:
            loader = DataLoader(
                TarImages(self.tars, self.case), batch_size=BATCH, num_workers=CORES, prefetch_factor=4,
                pin_memory=self.device.type == "cuda", multiprocessing_context="fork",
            )  # fmt: skip
            return sum(len(best(images_BHWC.numpy())[0]) for images_BHWC in loader), 0.0

        return run

    def ray_data(self) -> Run:
        """A Ray Data pipeline: tasks read the tars and decode, an actor scores batches.

        Its clock starts at the moment that the actor has loaded the network, for which Ray is made to wait: its
        start-up, ten seconds and more, would be nothing to a long scan.
        """
        import ray

        def run() -> tuple[int, float]:
            started = time.time()
            ray.init(num_cpus=CORES + 1, include_dashboard=False, log_to_driver=False)
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
            return sum(len(batch["labels"]) for batch in rows), float(rows[0]["ready"][0]) - started

        return run


def called_in_turn(checkpoint: str, case: Case) -> Callable[[Batch], Best]:
    """Return the network as a script calls it: one batch after the other; on a CPU, all cores on each."""
    model, device = checkpoint_io.load_model(checkpoint)[0], checkpoint_io.default_device()
    if device.type == "cuda":
        on_gpu = scoring.GpuScorer(model, case.preprocessing, KEPT, device, str(Path(checkpoint).parent))
        return lambda images_BHWC: on_gpu.submit(images_BHWC)()
    scorer = scoring.ScoringModule(model, case.preprocessing, KEPT, bf16=False).eval()
    scorer.set_memory_format(DEFAULT_SCORING_MODE)

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


def measured(case: Case, photos: Path) -> dict[str, float]:
    """Run the contestants; returns the images a second of each."""
    with tempfile.TemporaryDirectory() as folder:
        Bench(case, photographs(photos), Path(folder)).write()
        command = [sys.executable, "-m", "benchmarks.score", "--photos", str(photos), "--folder", folder]
        command += ["--case", str(cases().index(case)), "--contestant"]
        turns = [["ray_data"], ["scan", case.limit, "dataloader"], ["ray_data"]]
        printed = [by_turns({name: [*command, name] for name in names}, AT_MOST_S) for names in turns]
    rates: dict[str, float] = {}
    for name, lines in [item for contest in printed for item in contest.items()]:
        rates[name] = max(rates.get(name, 0.0), rate(name, lines, case))
    print(f"\n{case.architecture} at {case.resolution}, {case.images:,} images: {case.limit}-bound")
    for name, found in rates.items():
        print(f"{name:14}{found:10.1f}/s   scan / it {rates['scan'] / found:5.2f}", flush=True)
    return rates


def rate(name: str, lines: list[tuple[float, str]], case: Case) -> float:
    """Return images a second from what a contestant has printed in its last line, and when."""
    ended_s, line = lines[-1]
    images, start_s = line.split()
    if int(images) < case.images:
        raise SystemExit(f"{name}: {images} of {case.images} images")
    return int(images) / (ended_s - float(start_s))


def contest(bench: Bench, contestant: str) -> None:
    """Be one contestant: prepare, wait for the first turn, run."""
    if contestant not in ("dataloader", "ray_data"):  # a user's script does not know how this program sets torch up
        checkpoint_io.configure_torch()
    prepared: Run = getattr(bench, contestant)()
    wait_for_go()
    images, start_s = prepared()
    print(images, start_s, flush=True)


def cases() -> list[Case]:
    """Return what is measured on this machine."""
    return ON_GPU if torch.cuda.is_available() else ON_CPU


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
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    if arguments.contestant:
        contest(Bench(cases()[arguments.case], photos, arguments.folder), arguments.contestant)
        return
    print(f"{machine()}\n{len(photos)} photographs, {sum(map(len, photos)) / len(photos) / 1e3:.0f} kB on average")
    ratios: dict[str, list[float]] = {}
    for case in cases():
        rates = measured(case, arguments.photos)
        for name, found in rates.items():
            ratios.setdefault(NAMES.get(name, name), []).append(rates["scan"] / found)
    # Of a contestant in several cases, the one where the scan gains least.
    print(json.dumps({f"ratio_to_{name}": round(min(of), 3) for name, of in ratios.items() if name != "scan"}))


if __name__ == "__main__":
    main()
