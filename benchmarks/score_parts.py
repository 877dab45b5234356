"""Run the score stage, and its two parts alone: the model and the decoder."""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.score_rivals import Run
from benchmarks.score_workload import CLASSES, CLASSES_PER_IMAGE, CORES, Workload
from semiscale.data.image_decoding import ImageArray, decode_image
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import center_crop
from semiscale.models import checkpoint_io
from semiscale.receipts.base import Receipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.plan import shard_groups
from semiscale.stages.score import scorer as scoring
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.process_shard_loader import CPUS_PER_PROCESS
from semiscale.stages.score.scorer import Best
from semiscale.stages.score.stage import score

EMPTY_SPLIT = LabeledSplit(digest="", index="", shards="", samples=0, class_counts=[])


def prepare_scan(workload: Workload) -> Run:
    """Prepare the score stage in a fresh workdir.

    Its time includes reading the checkpoint.
    """
    config = _write_stage_inputs(workload, workload.folder / "run")
    # Libraries plan their kernels at the first batch, which is not timed.
    _load_scorer(workload)
    # pyarrow loads pandas at its first use, if it is installed. Only Ray needs it, and the images do not have it.
    import_module("pandas")
    return lambda: (score(config).scored, 0.0)


def prepare_model(workload: Workload) -> Run:
    """Prepare the model on decoded images in memory, as many as the pool has."""
    scorer = _load_scorer(workload)
    size = scorer.batch_size
    batch_BHWC = np.stack([_decode_and_crop(workload, data) for data in islice(cycle(workload.photos), size)])
    scorer.submit(batch_BHWC)()
    batches = -(-workload.case.images // size)

    def run() -> tuple[int, float]:
        pending: deque[Callable[[], Best]] = deque()
        for _ in range(batches):
            pending.append(scorer.submit(batch_BHWC))
            if len(pending) == scorer.in_flight:
                pending.popleft()()
        for result in pending:
            result()
        return batches * size, 0.0

    return run


def prepare_decoder(workload: Workload) -> Run:
    """Prepare decoding, resizing and cropping of images in memory, on all cores.

    There are as many processes as the loader of a GPU has. The decoded images are discarded.
    """
    processes = max(CORES // CPUS_PER_PROCESS, 1)
    share = -(-workload.case.images // processes)

    def run() -> tuple[int, float]:
        children = [get_context("fork").Process(target=_decode_share, args=(workload, share)) for _ in range(processes)]
        for process in children:
            process.start()
        for process in children:
            process.join()
        return sum(share for process in children if process.exitcode == 0), 0.0

    return run


def _load_scorer(workload: Workload) -> scoring.CpuScorer | scoring.GpuScorer:
    """Load the network as the scan uses it, and score a first batch."""
    model, size = checkpoint_io.load_model(workload.checkpoint)[0], workload.case.resolution
    scorer = scoring.make_scorer(
        checkpoint_io.default_device(), model, workload.case.preprocessing, CLASSES_PER_IMAGE, str(workload.folder)
    )
    scorer.submit(np.zeros((scorer.batch_size, size, size, 3), np.uint8))()
    return scorer


def _decode_share(workload: Workload, images: int) -> None:
    with ThreadPoolExecutor(min(CORES, CPUS_PER_PROCESS), "decode", torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(lambda data: _decode_and_crop(workload, data).size, islice(cycle(workload.photos), images)):
            pass


def _decode_and_crop(workload: Workload, data: bytes) -> ImageArray:
    return center_crop(decode_image(data), workload.case.preprocessing)


def _write_stage_inputs(workload: Workload, workdir: Path) -> ScoreConfig:
    """Write the inputs of the score stage, and return its config."""
    groups = shard_groups.build_shard_groups(workload.tars, str(workdir), SampleFields("image", ""))
    (workdir / "units.json").write_text(json.dumps([group.model_dump() for group in groups]))
    classes = [str(number) for number in range(CLASSES)]
    common = {"digest": "0", "folder": str(workdir), "seconds": 0.0}
    plan = PlanReceipt(
        stage="plan", name="bench", pool_digest="", classes=classes, train=EMPTY_SPLIT, validation=EMPTY_SPLIT,
        test=EMPTY_SPLIT, units=str(workdir / "units.json"), shards=len(workload.tars), pods=1,
        classes_per_image=CLASSES_PER_IMAGE, size_bytes=sum(Path(tar).stat().st_size for tar in workload.tars),
        failed={}, failures=[], notes=[], run={},
        **common,
    )  # fmt: skip
    teacher = TrainReceipt(
        stage="train", recipe="teacher", architecture=workload.case.architecture, checkpoint=workload.checkpoint,
        parameters=0, classes=classes, preprocessing=workload.case.preprocessing, images_processed=0, samples=0,
        learning_rate=0.0, validation_top1=0.0, curve=[], images_per_s=0.0, **common,
    )  # fmt: skip
    return ScoreConfig(
        workdir=str(workdir),
        plan=_write_receipt(workdir, plan),
        teacher=_write_receipt(workdir, teacher),
        pod=0,
        images_per_class=100,
    )


def _write_receipt(workdir: Path, receipt: Receipt) -> str:
    path = workdir / f"{receipt.stage}.json"
    path.write_text(receipt.model_dump_json())
    return str(path)
