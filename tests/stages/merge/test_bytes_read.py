"""Test that the merge reads at most three times the bytes of its selection.

This holds for any size of the pool. The tests have a thousand classes, and divide K between the shard groups as the
paper's K would be. With groups of eight million images, a group has 128 winners of a class in the paper's pool. It has
12.8 in a pool that is ten times as large with the same K. The values 16 and 8 belong to pools of ten and of a hundred
million rows. The shard groups have only their best rows, because the merge never reaches the others. This makes them
fast to generate.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from semiscale import storage
from semiscale.receipts.score import PartSeconds, ShardAccounting, ShardGroupReceipt
from semiscale.scores import sample_locations, score_file
from semiscale.scores.score_file import ScoreFileReader, ScoreRows
from semiscale.stages.merge.locate_winners import locate_winners
from semiscale.stages.merge.top_k import select_top_k

CLASSES, CLASSES_KEPT = 1000, 2
# Shards of a shard group.
SHARDS = 8


def random_rows(group: int, codes: score_file.U64) -> ScoreRows:
    """Return random rows for the samples of a shard group."""
    rng, images = np.random.default_rng(group), len(codes)
    first = rng.integers(0, CLASSES, images)
    labels_BP = np.column_stack([first, (first + rng.integers(1, CLASSES, images)) % CLASSES])
    scores_BP = -np.sort(-rng.normal(0, 3, (images, CLASSES_KEPT)), axis=1)
    return ScoreRows(
        labels_BP.astype(np.uint16).ravel(),
        scores_BP.astype(np.float32).ravel(),
        np.repeat(codes, CLASSES_KEPT),
        np.tile(np.arange(CLASSES_KEPT, dtype=np.uint8), images),
        np.repeat(score_file.tie_breakers(codes, shard_names(group)), CLASSES_KEPT),
    )


def shard_names(group: int) -> list[str]:
    """Return the names of the shards of a shard group."""
    return [f"{group:03}/part-{shard:06}.tar" for shard in range(SHARDS)]


def sample_table(codes: score_file.U64) -> pa.Table:
    """Return locations of samples that resemble those of a crawl."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(20_000, 200_000, len(codes))
    keys = [f"crawl/{code >> 32:06}/{code % 2**32 * 7919 % 1_000_003:08}" for code in codes.tolist()]
    uris = [f"gs://bucket/pool/part-{code >> 32:06}.tar" for code in codes.tolist()]
    return pa.table({"sample": codes, "key": keys, "uri": uris, "offset": np.cumsum(sizes), "size_bytes": sizes})


def write_group(folder: Path, group: int, head: int, samples: pa.Table) -> ShardGroupReceipt:
    """Write the files of a shard group, like the score stage."""
    banded = score_file.sort_into_bands(random_rows(group, samples["sample"].to_numpy()), head)
    metadata = {"teacher": "t", "unit": str(group), "shards": shard_names(group)}
    files = {"scores": score_file.write_score_file(banded, CLASSES, metadata)}
    files["places"], files["samples"] = sample_locations.write_locations(samples, banded, str(group))
    uris = {name: str(folder / f"{group}-{name}.parquet") for name in files}
    for name, data in files.items():
        Path(uris[name]).write_bytes(data)
    count = ShardAccounting(shard="all", digest="all", listed=len(samples), scored=len(samples), failed={})
    return ShardGroupReceipt(
        **uris, stage="score", digest=str(group), folder=str(folder), seconds=0, teacher="t", pod=0, shards=[count],
        failures=[], clocks=PartSeconds(),
    )  # fmt: skip


@pytest.mark.parametrize(("images_per_class", "num_groups"), [(128, 1), (128, 10), (16, 1), (16, 2)])
def test_merge_reads_at_most_three_times_the_winners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_per_class: int, num_groups: int
) -> None:
    head = score_file.first_band_size(images_per_class, num_groups)
    images = 2 * (head + 20) * CLASSES // CLASSES_KEPT // SHARDS * SHARDS
    codes = np.concatenate(
        [score_file.encode_sample_ids(shard, np.arange(images // SHARDS)) for shard in range(SHARDS)]
    )
    samples = sample_table(codes)
    receipts = [write_group(tmp_path, group, head, samples) for group in range(num_groups)]
    bytes_of: dict[str, int] = {"scores": 0, "places": 0, "samples": 0}
    read = storage.read_bytes

    def count_bytes(uri: str, start: int = 0, size: int | None = None) -> bytes:
        data = read(uri, start, size)
        bytes_of[uri.rpartition("-")[2].removesuffix(".parquet")] += len(data)
        return data

    monkeypatch.setattr(storage, "read_bytes", count_bytes)
    score_files = [ScoreFileReader(receipt.scores) for receipt in receipts]
    winners = select_top_k(score_files, CLASSES, images_per_class, CLASSES_KEPT)
    selection = locate_winners(winners, receipts, score_files, CLASSES)
    assert len(winners) == CLASSES * images_per_class
    reported = sum(file.bytes_read for file in score_files) + selection.bytes_read
    assert sum(bytes_of.values()) == reported
    winners_file = score_file.write_score_file(in_first_band(winners.rows), CLASSES, {})
    assert bytes_of["scores"] <= 3 * len(winners_file)
    # The locations are read in addition to the scores, from the same bands.
    winners_by_group = [winners.rows.take(winners.group == group) for group in range(num_groups)]
    places_files = [sample_locations.write_locations(samples, in_first_band(rows), "")[0] for rows in winners_by_group]
    assert bytes_of["places"] <= 3 * sum(map(len, places_files))
    assert bytes_of["samples"] == 0


def in_first_band(rows: ScoreRows) -> score_file.BandedRows:
    """Assign all rows to the first band."""
    return score_file.BandedRows(rows, np.zeros(len(rows), np.uint8))
