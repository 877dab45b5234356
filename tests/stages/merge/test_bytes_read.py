"""What the merge reads of a large pool: at most three times the bytes of what it selects, however large the pool grows.

A thousand classes and the paper's K / units: 128 where K is the paper's share of a pool of units of eight million
images, 12.8 where the pool has grown tenfold at the same K; 16 and 8 for ten million rows and a hundred million. Units
hold the best of their rows alone, so that they are quickly drawn: what cannot be read need not be there.
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

CLASSES, KEPT = 1000, 2
SHARDS = 8  # of a unit


def rows_of(unit: int, codes: score_file.U64) -> ScoreRows:
    """Draw a unit's rows."""
    rng, images = np.random.default_rng(unit), len(codes)
    first = rng.integers(0, CLASSES, images)
    labels_BP = np.column_stack([first, (first + rng.integers(1, CLASSES, images)) % CLASSES])
    scores_BP = -np.sort(-rng.normal(0, 3, (images, KEPT)), axis=1)
    return ScoreRows(
        labels_BP.astype(np.uint16).ravel(),
        scores_BP.astype(np.float32).ravel(),
        np.repeat(codes, KEPT),
        np.tile(np.arange(KEPT, dtype=np.uint8), images),
        np.repeat(score_file.tie_breakers(codes, names_of(unit)), KEPT),
    )


def names_of(unit: int) -> list[str]:
    """Name a unit's shards."""
    return [f"{unit:03}/part-{shard:06}.tar" for shard in range(SHARDS)]


def samples_of(codes: score_file.U64) -> pa.Table:
    """Return the places of samples as a crawl has them."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(20_000, 200_000, len(codes))
    keys = [f"crawl/{code >> 32:06}/{code % 2**32 * 7919 % 1_000_003:08}" for code in codes.tolist()]
    uris = [f"gs://bucket/pool/part-{code >> 32:06}.tar" for code in codes.tolist()]
    return pa.table({"sample": codes, "key": keys, "uri": uris, "offset": np.cumsum(sizes), "size_bytes": sizes})


def write_unit(folder: Path, unit: int, head: int, samples: pa.Table) -> ShardGroupReceipt:
    """Write a unit's files as the scan does."""
    banded = score_file.sort_into_bands(rows_of(unit, samples["sample"].to_numpy()), head)
    metadata = {"teacher": "t", "unit": str(unit), "shards": names_of(unit)}
    files = {"scores": score_file.write_score_file(banded, CLASSES, metadata)}
    files["places"], files["samples"] = sample_locations.write_locations(samples, banded, str(unit))
    uris = {name: str(folder / f"{unit}-{name}.parquet") for name in files}
    for name, data in files.items():
        Path(uris[name]).write_bytes(data)
    count = ShardAccounting(shard="all", digest="all", listed=len(samples), scored=len(samples), failed={})
    return ShardGroupReceipt(
        **uris, stage="score", digest=str(unit), folder=str(folder), seconds=0, teacher="t", pod=0, shards=[count],
        failures=[], clocks=PartSeconds(),
    )  # fmt: skip


@pytest.mark.parametrize(("images_per_class", "grown"), [(128, 1), (128, 10), (16, 1), (16, 2)])
def test_it_reads_three_times_the_winners_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images_per_class: int, grown: int
) -> None:
    head = score_file.first_band_size(images_per_class, grown)
    images = 2 * (head + 20) * CLASSES // KEPT // SHARDS * SHARDS
    codes = np.concatenate(
        [score_file.encode_sample_ids(shard, np.arange(images // SHARDS)) for shard in range(SHARDS)]
    )
    samples = samples_of(codes)
    receipts = [write_unit(tmp_path, unit, head, samples) for unit in range(grown)]
    asked: dict[str, int] = {"scores": 0, "places": 0, "samples": 0}
    read = storage.read_bytes

    def counted(uri: str, start: int = 0, size: int | None = None) -> bytes:
        data = read(uri, start, size)
        asked[uri.rpartition("-")[2].removesuffix(".parquet")] += len(data)
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    units = [ScoreFileReader(receipt.scores) for receipt in receipts]
    winners = select_top_k(units, CLASSES, images_per_class, KEPT)
    found = locate_winners(winners, receipts, units, CLASSES)
    assert len(winners) == CLASSES * images_per_class
    assert sum(asked.values()) == sum(unit.bytes_read for unit in units) + found.bytes_read, "what is told is true"
    own = score_file.write_score_file(all_in_front(winners.rows), CLASSES, {})
    assert asked["scores"] <= 3 * len(own)
    # The winners' places are read beside the scores, and of no more bands.
    mine = [winners.rows.take(winners.unit == unit) for unit in range(grown)]
    own_places = [sample_locations.write_locations(samples, all_in_front(rows), "")[0] for rows in mine]
    assert asked["places"] <= 3 * sum(map(len, own_places))
    assert asked["samples"] == 0


def all_in_front(rows: ScoreRows) -> score_file.BandedRows:
    """Take rows for a unit's first band."""
    return score_file.BandedRows(rows, np.zeros(len(rows), np.uint8))
