"""The scan of one unit: read, decode, forward, write, each with its own clock. Only this module here knows torch."""

import io
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from os import cpu_count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components.score.config import ScoreConfig
from components.shared import models, scores, storage
from components.shared import shards as sharding
from components.shared.decode import Pixels, Undecodable, decode
from components.shared.preprocess import fixed_cut
from components.shared.progress import Progress, say
from components.shared.receipts import Clocks, Failure, PlanReceipt, ShardCount, TrainReceipt
from components.shared.shards import Columns, Sample, Shard, Unit

BATCH = 64  # the same for every batch, so that an image's scores do not depend on how many others came with it
MAX_FAILURES_LISTED = 100


def log_odds(logits_BC: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the `classes` best classes of each image and their log-odds, fp32: x_c - logsumexp of the other logits.

    Monotone in the softmax probability, so it is the paper's ranking (section 3.2), and it still tells images apart
    where the probability has rounded to 1. For the best class the others are summed without it, because subtracting
    it from the sum of all would cancel; for any other the sum is at least twice what is subtracted.
    """
    logits_BC = logits_BC.float()
    best_BP, labels_BP = logits_BC.topk(classes)
    top_B1 = best_BP[:, :1]
    weights_BC = (logits_BC - top_B1).exp()
    others_BP = top_B1 + (weights_BC.sum(1, keepdim=True) - (best_BP - top_B1).exp()).log()
    others_BP[:, 0] = logits_BC.scatter(1, labels_BP[:, :1], -torch.inf).logsumexp(1)
    return labels_BP, best_BP - others_BP


@dataclass
class _Gathered:
    """What has been scored of one unit so far."""

    labels: list[Tensor] = field(default_factory=list)
    log_odds: list[Tensor] = field(default_factory=list)
    codes: list[scores.U64] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    counts: list[ShardCount] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Scan:
    """One pod's scan: the model on its device, the pool of decoding threads, the clocks."""

    def __init__(self, config: ScoreConfig, plan: PlanReceipt, teacher: TrainReceipt, kept: int, units: int) -> None:
        models.use_threads()
        self._config, self._plan, self._teacher, self._kept = config, plan, teacher, kept
        self._preprocessing = teacher.preprocessing
        self._head = scores.head_size(config.images_per_class, units)
        self._device = models.device()
        self._model = models.read(teacher.checkpoint)[0].to(self._device).eval()
        self._seconds = dict.fromkeys(Clocks.model_fields, 0.0)
        self._progress = Progress("score", 0)

    def unit(self, unit: Unit, folder: str) -> tuple[dict[str, object], Clocks]:
        """Score one unit and write its two files to `folder`; returns the receipt's fields, and where the time went."""
        self._seconds = dict.fromkeys(Clocks.model_fields, 0.0)
        gathered = _Gathered()
        for number, shard in enumerate(unit.shards):
            self._shard(number, shard, gathered)
        started = time.monotonic()
        fields = self._write(unit, gathered, folder)
        self._seconds["write"] += time.monotonic() - started
        return fields, Clocks(**{part: round(seconds, 3) for part, seconds in self._seconds.items()})

    def _shard(self, number: int, shard: Shard, gathered: _Gathered) -> None:
        failed: Counter[str] = Counter()
        scored = 0
        with ThreadPoolExecutor(cpu_count()) as pool:
            for batch in self._read(shard):
                started = time.monotonic()
                outcomes = list(pool.map(self._decoded, batch))
                self._seconds["decode"] += time.monotonic() - started
                usable = []
                for sample, outcome in zip(batch, outcomes, strict=True):
                    if isinstance(outcome, str):
                        failed[outcome] += 1
                        gathered.failures.append(Failure(shard=shard.name, key=sample.key, reason=outcome))
                    else:
                        usable.append((sample, outcome))
                if usable:
                    self._forward(number, usable, gathered)
                scored += len(usable)
                self._progress.add(len(batch))
        listed = scored + failed.total()
        gathered.counts.append(
            ShardCount(shard=shard.name, digest=shard.digest(), listed=listed, scored=scored, failed=dict(failed))
        )

    def _read(self, shard: Shard) -> Iterator[list[Sample]]:
        samples = sharding.read(shard, Columns(self._config.image_column, ""))
        while True:
            started = time.monotonic()
            batch = list(islice(samples, BATCH))
            self._seconds["read"] += time.monotonic() - started
            if not batch:
                return
            yield batch

    def _decoded(self, sample: Sample) -> Pixels | str:
        if sample.problem:
            return sample.problem
        try:
            return fixed_cut(decode(sample.image), self._preprocessing)
        except Undecodable as error:
            return str(error)

    @torch.inference_mode()
    def _forward(self, shard: int, usable: list[tuple[Sample, Pixels]], gathered: _Gathered) -> None:
        started = time.monotonic()
        size = self._preprocessing.resolution
        images_BHWC = np.zeros((BATCH, size, size, 3), np.uint8)
        for place, (_, pixels) in enumerate(usable):
            images_BHWC[place] = pixels
        images_BCHW = models.normalised(images_BHWC, self._preprocessing, self._device)
        labels_BP, scores_BP = log_odds(self._model(images_BCHW)[: len(usable)], self._kept)
        gathered.labels.append(labels_BP.cpu())
        gathered.log_odds.append(scores_BP.cpu())
        gathered.codes.append(scores.sample_codes(shard, np.array([sample.index for sample, _ in usable])))
        for sample, _ in usable:
            gathered.sizes.append(len(sample.image))
            gathered.samples.append(Sample(sample.index, sample.key, b"", sample.uri, sample.offset))
        self._seconds["forward"] += time.monotonic() - started

    def _write(self, unit: Unit, gathered: _Gathered, folder: str) -> dict[str, object]:
        names = [shard.name for shard in unit.shards]
        codes = np.concatenate([np.empty(0, np.uint64), *gathered.codes])
        rows = _rows(gathered, codes, names, self._kept)
        metadata = {"teacher": self._teacher.digest, "unit": unit.digest, "shards": names}
        scores_uri = storage.join(folder, "scores.parquet")
        samples_uri = storage.join(folder, "samples.parquet")
        storage.write(scores_uri, scores.encode(rows, len(self._plan.classes), self._head, metadata))
        storage.write(samples_uri, _samples(gathered, codes))
        counts = gathered.counts
        say("score", f"unit {unit.digest}: {len(codes):,} images scored, {len(gathered.failures):,} failed")
        return {
            "digest": unit.digest,
            "teacher": self._teacher.digest,
            "scores": scores_uri,
            "samples": samples_uri,
            "shards": counts,
            "failures": gathered.failures[:MAX_FAILURES_LISTED],
        }


def _rows(gathered: _Gathered, codes: scores.U64, names: list[str], kept: int) -> scores.Rows:
    if not gathered.labels:
        nothing = np.empty(0)
        return scores.Rows(*(nothing.astype(kind) for kind in ("u2", "f4", "u8", "u1", "u8")))
    tie = scores.ties(codes, names)
    return scores.Rows(
        label=torch.cat(gathered.labels).flatten().numpy().astype(np.uint16),
        score=torch.cat(gathered.log_odds).flatten().numpy(),
        sample=np.repeat(codes, kept),
        position=np.tile(np.arange(kept, dtype=np.uint8), len(codes)),
        tie=np.repeat(tie, kept),
    )


def _samples(gathered: _Gathered, codes: scores.U64) -> bytes:
    """Where every scored image lies: what the merge looks its winners up in."""
    table = pa.table(
        {
            "sample": codes,
            "key": [sample.key for sample in gathered.samples],
            "uri": pa.array([sample.uri for sample in gathered.samples], pa.string()).dictionary_encode(),
            "offset": pa.array([sample.offset for sample in gathered.samples], pa.int64()),
            "size_bytes": pa.array(gathered.sizes, pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
