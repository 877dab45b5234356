"""Measure selecting again from the scores of a large pool, as one whole process.

    make bench-reselect IMAGES=100000000

The selection has another K, another P and an exclusion list. The scored pool is written as scoring leaves it: shard
groups of 8 million images, compacted by the stage's own code, with ten scored classes of 1000 an image. One group is
drawn at random. The others have its rows under other shard names, and so other tie-breaks, which is enough to measure
time. The benchmark prints the cost of compacting a group, then the cost of `merge` with another K and keys to remove.
The last line is one JSON object, with `seconds` and `peak_rss_bytes` of the most expensive selection.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.merge import CLASSES, IMAGES_PER_SHARD, KEPT, drawn_choices, machine
from semiscale import storage
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import Shard, ShardGroup
from semiscale.receipts.base import Receipt
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.score import PartSeconds, ScoreReceipt, ShardAccounting, ShardGroupReceipt
from semiscale.scores import sample_locations, score_file
from semiscale.stages.plan.shard_groups import TARGET_IMAGES_PER_GROUP
from semiscale.stages.score import shard_scores
from semiscale.stages.score.shard_scores import ShardScores

FOLDER = Path("runs/bench")
REMOVED_KEYS = 10_000
SEALERS = 2  # processes that write units
RESELECT = """
import sys
from semiscale.stages.merge.stage import MergeConfig, merge
receipt = merge(MergeConfig.model_validate_json(sys.argv[1]))
print(receipt.model_dump_json(include={"images", "unique_images", "ledger", "bytes_read"}))
"""


def key(shard: int, index: int) -> str:
    """Name an image as a crawl would."""
    return f"crawl/{shard:06}/{index * 7919 % 1_000_003:08}"


def drawn_part(shard: int, images: int) -> ShardScores:
    """Draw one shard's scores."""
    rng = np.random.default_rng((3, shard))
    sizes = rng.integers(20_000, 200_000, images)
    labels_BP, scores_BP = drawn_choices((3, shard), images)
    name = f"part-{shard:06}.tar"
    samples = {
        "index": np.arange(images),
        "key": [key(shard, index) for index in range(images)],
        "uri": [f"gs://bucket/pool/{name}"] * images,
        "offset": np.cumsum(sizes),
        "size_bytes": sizes,
    }
    count = ShardAccounting(
        shard=name, digest=f"{shard:016}", listed=images, scored=images, failed={}, clocks=PartSeconds()
    )
    return ShardScores(count, [], 0.0, pa.table(samples), labels_BP, scores_BP)


class ScoredPool:
    """A pool's plan, units and receipts in a folder, written once."""

    def __init__(self, images: int, images_per_class: int) -> None:
        self.folder = FOLDER / f"reselect-{images}-{images_per_class}"
        self._per_unit = min(images, TARGET_IMAGES_PER_GROUP)
        self._units = -(-images // TARGET_IMAGES_PER_GROUP)
        self._head = score_file.first_band_size(images_per_class, self._units)

    def write(self) -> None:
        """Seal one unit, and the others with its rows; the receipts last."""
        if (self.folder / "plan.json").exists():
            return
        drawn = [drawn_part(shard, IMAGES_PER_SHARD) for shard in range(self._per_unit // IMAGES_PER_SHARD)]
        started, cpu = time.monotonic(), time.process_time()
        files = shard_scores.build_group_files(
            drawn, self._head, CLASSES, self._metadata(0, [part.count for part in drawn])
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"sealing {self._per_unit:,} images: {time.process_time() - cpu:.0f} CPU-s, "
            f"{time.monotonic() - started:.0f} s, peak {peak:.1f} GB with its parts, "
            + ", ".join(f"{name} {len(data) / 1e6:.0f} MB" for name, data in files.items()),
            flush=True,
        )
        del files
        rows, samples = (
            score_file.sort_into_bands(shard_scores.group_rows(drawn), self._head),
            shard_scores.group_samples(drawn),
        )
        counts = [part.count for part in drawn]
        del drawn  # the processes share what is left
        children = [self._start(range(first, self._units, SEALERS), rows, samples, counts) for first in range(SEALERS)]
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit("a unit could not be written")
        self._write_plan(counts)

    def _start(
        self, units: range, rows: score_file.BandedRows, samples: pa.Table, counts: list[ShardAccounting]
    ) -> int:
        """Write some of the units in a process of its own; returns its id. The rows, one unit's, are in memory once."""
        if child := os.fork():
            return child
        for unit in units:
            files = {"scores": score_file.write_score_file(rows, CLASSES, self._metadata(unit, counts))}
            files["places"], files["samples"] = sample_locations.write_locations(samples, rows, self._digest(unit))
            self._write_unit(unit, files, counts)
        os._exit(0)

    def reselect(self, images_per_class: int, remove: bool) -> dict[str, Any]:
        """Select with another K in a fresh process; prints and returns what it cost."""
        config = {
            "workdir": str(self.folder / f"work-{time.time_ns()}"),
            "plan": str(self.folder / "plan.json"),
            "scores": [str(self.folder / "pod.json")],
            "images_per_class": images_per_class,
            "classes_per_image": KEPT,
            "max_failed_fraction": 0.01,
            "remove": str(self.folder / "remove.txt") if remove else "",
        }
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", RESELECT, json.dumps(config)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        output_lines = process.stdout.read().decode().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit("the selection failed")
        cost: dict[str, Any] = {
            "images_per_class": images_per_class,
            "keys_removed": REMOVED_KEYS if remove else 0,
            "seconds": round(time.monotonic() - started, 2),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            **json.loads(output_lines[-1]),
        }
        print(", ".join(f"{name} {value}" for name, value in cost.items()), flush=True)
        return cost

    def _digest(self, unit: int) -> str:
        return f"{unit:016}"

    def _names(self, unit: int, counts: list[ShardAccounting]) -> list[str]:
        return [f"{unit:03}/{count.shard}" for count in counts]

    def _metadata(self, unit: int, counts: list[ShardAccounting]) -> dict[str, object]:
        return {"teacher": "t", "unit": self._digest(unit), "shards": self._names(unit, counts)}

    def _write_unit(self, unit: int, files: dict[str, bytes], counts: list[ShardAccounting]) -> None:
        folder = self.folder / "scores" / self._digest(unit)
        for name, data in files.items():
            storage.write_bytes(str(folder / f"{name}.parquet"), data)
        named = [
            count.model_copy(update={"shard": name, "digest": shard.digest()})
            for count, name, shard in zip(counts, self._names(unit, counts), self._shards(unit, counts), strict=True)
        ]
        common = {"stage": "score", "digest": self._digest(unit), "folder": str(folder), "seconds": 0.0}
        uris = {name: str(folder / f"{name}.parquet") for name in files}
        self._keep(
            folder / "receipt.json",
            ShardGroupReceipt(**common, **uris, teacher="t", pod=0, shards=named, failures=[], clocks=PartSeconds()),
        )

    def _shards(self, unit: int, counts: list[ShardAccounting]) -> list[Shard]:
        return [
            Shard(uri=f"gs://bucket/{name}", name=name, kind="tar", size_bytes=1, version="1")
            for name in self._names(unit, counts)
        ]

    def _write_plan(self, counts: list[ShardAccounting]) -> None:
        units = [
            ShardGroup(digest=self._digest(unit), shards=self._shards(unit, counts)) for unit in range(self._units)
        ]
        storage.write_bytes(str(self.folder / "units.json"), json.dumps([unit.model_dump() for unit in units]).encode())
        keys = [key(number % len(counts), number // len(counts)) for number in range(REMOVED_KEYS)]
        storage.write_bytes(str(self.folder / "remove.txt"), "\n".join(keys).encode())
        common = {"seconds": 0.0, "folder": str(self.folder / "scores")}
        pod = ScoreReceipt(
            **common, stage="score", digest="s", pod=0, teacher="t", units=self._units, units_found=0,
            listed=0, scored=0, failed={}, clocks=PartSeconds(),
        )  # fmt: skip
        self._keep(self.folder / "pod.json", pod)
        split = LabeledSplit(digest="", index="", shards="", samples=0, class_counts=[])
        plan = PlanReceipt(
            **common, stage="plan", digest="p", name="bench", pool_digest="p",
            train=split, validation=split, test=split,
            classes=[f"class {number}" for number in range(CLASSES)], units=str(self.folder / "units.json"), shards=0,
            size_bytes=0, pods=1, classes_per_image=KEPT, failed={}, failures=[], notes=[], run={},
        )  # fmt: skip
        self._keep(self.folder / "plan.json", plan)

    @staticmethod
    def _keep(path: Path, receipt: Receipt) -> None:
        storage.write_bytes(str(path), receipt.model_dump_json().encode())


def main() -> None:
    """Make the pool where it is not there yet, and select from it three times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10**8)
    images = parser.parse_args().images
    images_per_class = max(images // 62_500, 1)  # the paper's share
    print(machine(), flush=True)
    pool = ScoredPool(images, images_per_class)
    if os.fork() == 0:  # in a process of its own, whose memory is not counted into the selections'
        pool.write()
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit("the pool could not be written")
    asked = [(images_per_class, False), (max(images_per_class // 2, 1), True), (2 * images_per_class, True)]
    costs = [pool.reselect(wanted, remove) for wanted, remove in asked]
    worst = {name: max(cost[name] for cost in costs) for name in ("seconds", "cpu_s", "peak_rss_bytes")}
    print(json.dumps({"images": images, "machine": machine(), **worst, "selections": costs}))


if __name__ == "__main__":
    main()
