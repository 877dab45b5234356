"""Measure selecting again from the scores of a large pool, as one whole process.

    make bench-reselect IMAGES=100000000

The selection has another K, another P and an exclusion list. The scored pool is written in the form of the score
stage. It has shard groups of 8 million images, which the stage's own code has compacted, with ten scored classes of
1000 an image. One group is drawn at random. The others have its rows under other shard names, and so other tie-breaks,
which is enough to measure time. The benchmark prints the cost of compacting a group, then the cost of `merge` with
another K and keys to remove. The last line is one JSON object, with `seconds` and `peak_rss_bytes` of the most
expensive selection.
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

from benchmarks.merge import machine
from benchmarks.merge_pool import CLASSES, CLASSES_PER_IMAGE, IMAGES_PER_SHARD, draw_scores
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
# Processes that write shard groups.
WRITERS = 2
RESELECT = """
import sys
from semiscale.stages.merge.stage import MergeConfig, merge
receipt = merge(MergeConfig.model_validate_json(sys.argv[1]))
print(receipt.model_dump_json(include={"images", "unique_images", "ledger", "bytes_read"}))
"""


def key(shard: int, index: int) -> str:
    """Return the key of an image, in the form of a crawl's keys.

    Args:
        shard: The number of the shard.
        index: The index of the image in the shard.
    """
    return f"crawl/{shard:06}/{index * 7919 % 1_000_003:08}"


def draw_shard_scores(shard: int, images: int) -> ShardScores:
    """Draw the scores of one shard.

    Args:
        shard: The number of the shard.
        images: The number of its images.
    """
    rng = np.random.default_rng((3, shard))
    sizes = rng.integers(20_000, 200_000, images)
    labels_BP, scores_BP = draw_scores((3, shard), images)
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
    """The plan, shard groups and receipts of a scored pool in a folder."""

    def __init__(self, images: int, images_per_class: int) -> None:
        self.folder = FOLDER / f"reselect-{images}-{images_per_class}"
        self._images_per_group = min(images, TARGET_IMAGES_PER_GROUP)
        self._groups = -(-images // TARGET_IMAGES_PER_GROUP)
        self._head = score_file.first_band_size(images_per_class, self._groups)

    def write(self) -> None:
        """Compact one shard group, write the others with its rows, and then the receipts.

        A finished pool is not written again.
        """
        if (self.folder / "plan.json").exists():
            return
        parts = [
            draw_shard_scores(shard, IMAGES_PER_SHARD) for shard in range(self._images_per_group // IMAGES_PER_SHARD)
        ]
        started, cpu_before_s = time.monotonic(), time.process_time()
        files = shard_scores.build_group_files(
            parts, self._head, CLASSES, self._metadata(0, [part.count for part in parts])
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"compacting {self._images_per_group:,} images: {time.process_time() - cpu_before_s:.0f} CPU-s, "
            f"{time.monotonic() - started:.0f} s, peak {peak:.1f} GB with its parts, "
            + ", ".join(f"{name} {len(data) / 1e6:.0f} MB" for name, data in files.items()),
            flush=True,
        )
        del files
        rows, samples = (
            score_file.sort_into_bands(shard_scores.group_rows(parts), self._head),
            shard_scores.group_samples(parts),
        )
        counts = [part.count for part in parts]
        # The processes share the memory of the rest.
        del parts
        children = [self._start(range(first, self._groups, WRITERS), rows, samples, counts) for first in range(WRITERS)]
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit("a shard group could not be written")
        self._write_plan(counts)

    def _start(
        self, groups: range, rows: score_file.BandedRows, samples: pa.Table, counts: list[ShardAccounting]
    ) -> int:
        """Write some of the shard groups in a child process, and return its id.

        The rows of one shard group are in memory once.
        """
        if child := os.fork():
            return child
        for group in groups:
            files = {"scores": score_file.write_score_file(rows, CLASSES, self._metadata(group, counts))}
            files["places"], files["samples"] = sample_locations.write_locations(samples, rows, self._digest(group))
            self._write_group(group, files, counts)
        os._exit(0)

    def reselect(self, images_per_class: int, remove: bool) -> dict[str, Any]:
        """Select with another K in a fresh process; print and return the cost.

        Args:
            images_per_class: K.
            remove: Whether an exclusion list is given.

        Raises:
            SystemExit: The selection failed.
        """
        config = {
            "workdir": str(self.folder / f"work-{time.time_ns()}"),
            "plan": str(self.folder / "plan.json"),
            "scores": [str(self.folder / "pod.json")],
            "images_per_class": images_per_class,
            "classes_per_image": CLASSES_PER_IMAGE,
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

    def _digest(self, group: int) -> str:
        return f"{group:016}"

    def _names(self, group: int, counts: list[ShardAccounting]) -> list[str]:
        return [f"{group:03}/{count.shard}" for count in counts]

    def _metadata(self, group: int, counts: list[ShardAccounting]) -> dict[str, object]:
        return {"teacher": "t", "unit": self._digest(group), "shards": self._names(group, counts)}

    def _write_group(self, group: int, files: dict[str, bytes], counts: list[ShardAccounting]) -> None:
        folder = self.folder / "scores" / self._digest(group)
        for name, data in files.items():
            storage.write_bytes(str(folder / f"{name}.parquet"), data)
        shards = [
            count.model_copy(update={"shard": name, "digest": shard.digest()})
            for count, name, shard in zip(counts, self._names(group, counts), self._shards(group, counts), strict=True)
        ]
        common = {"stage": "score", "digest": self._digest(group), "folder": str(folder), "seconds": 0.0}
        uris = {name: str(folder / f"{name}.parquet") for name in files}
        self._write_receipt(
            folder / "receipt.json",
            ShardGroupReceipt(**common, **uris, teacher="t", pod=0, shards=shards, failures=[], clocks=PartSeconds()),
        )

    def _shards(self, group: int, counts: list[ShardAccounting]) -> list[Shard]:
        return [
            Shard(uri=f"gs://bucket/{name}", name=name, kind="tar", size_bytes=1, version="1")
            for name in self._names(group, counts)
        ]

    def _write_plan(self, counts: list[ShardAccounting]) -> None:
        groups = [
            ShardGroup(digest=self._digest(group), shards=self._shards(group, counts)) for group in range(self._groups)
        ]
        storage.write_bytes(
            str(self.folder / "units.json"), json.dumps([group.model_dump() for group in groups]).encode()
        )
        keys = [key(number % len(counts), number // len(counts)) for number in range(REMOVED_KEYS)]
        storage.write_bytes(str(self.folder / "remove.txt"), "\n".join(keys).encode())
        common = {"seconds": 0.0, "folder": str(self.folder / "scores")}
        pod = ScoreReceipt(
            **common, stage="score", digest="s", pod=0, teacher="t", units=self._groups, units_found=0,
            listed=0, scored=0, failed={}, clocks=PartSeconds(),
        )  # fmt: skip
        self._write_receipt(self.folder / "pod.json", pod)
        split = LabeledSplit(digest="", index="", shards="", samples=0, class_counts=[])
        plan = PlanReceipt(
            **common, stage="plan", digest="p", name="bench", pool_digest="p",
            train=split, validation=split, test=split,
            classes=[f"class {number}" for number in range(CLASSES)], units=str(self.folder / "units.json"), shards=0,
            size_bytes=0, pods=1, classes_per_image=CLASSES_PER_IMAGE, failed={}, failures=[], notes=[], run={},
        )  # fmt: skip
        self._write_receipt(self.folder / "plan.json", plan)

    @staticmethod
    def _write_receipt(path: Path, receipt: Receipt) -> None:
        storage.write_bytes(str(path), receipt.model_dump_json().encode())


def main() -> None:
    """Write the pool if it is not there yet, and select from it three times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10**8)
    images = parser.parse_args().images
    # The paper selects this share of its pool.
    images_per_class = max(images // 62_500, 1)
    print(machine(), flush=True)
    pool = ScoredPool(images, images_per_class)
    # The memory of a child process is not counted as memory of the selections.
    if os.fork() == 0:
        pool.write()
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit("the pool could not be written")
    selections = [(images_per_class, False), (max(images_per_class // 2, 1), True), (2 * images_per_class, True)]
    costs = [pool.reselect(wanted, remove) for wanted, remove in selections]
    worst = {name: max(cost[name] for cost in costs) for name in ("seconds", "cpu_s", "peak_rss_bytes")}
    print(json.dumps({"images": images, "machine": machine(), **worst, "selections": costs}))


if __name__ == "__main__":
    main()
