"""Test the locations of samples: bytes read for winners, and damaged files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from semiscale.common.errors import SemiscaleError
from semiscale.receipts.score import PartSeconds, ShardAccounting, ShardGroupReceipt
from semiscale.scores import sample_locations, score_file
from semiscale.scores.score_file import U64, ScoreRows
from tests.support.parquet_damage import damage, truncate_rows

SAMPLES, CLASSES, HEAD = 3000, 4, 20


def write_shard_group(folder: Path) -> tuple[pa.Table, score_file.BandedRows]:
    """Write the locations of a shard group of two shards.

    Every image is ranked in two of four classes.
    """
    rng = np.random.default_rng(0)
    codes = np.concatenate([score_file.encode_sample_ids(shard, np.arange(SAMPLES // 2)) for shard in (0, 1)])
    label = np.column_stack([rng.integers(0, 2, SAMPLES), rng.integers(2, CLASSES, SAMPLES)])
    tie = score_file.tie_breakers(codes, ["a.tar", "b.tar"])
    rows = ScoreRows(
        label.astype(np.uint16).ravel(),
        rng.random(2 * SAMPLES).astype(np.float32),
        np.repeat(codes, 2),
        np.tile(np.array([0, 1], np.uint8), SAMPLES),
        np.repeat(tie, 2),
    )
    table = pa.table(
        {
            "sample": codes,
            "key": [f"key {number}" for number in range(SAMPLES)],
            "uri": ["gs://pool/a.tar"] * (SAMPLES // 2) + ["gs://pool/b.tar"] * (SAMPLES // 2),
            "offset": np.arange(SAMPLES) * 512,
            "size_bytes": rng.integers(1, 10**6, SAMPLES),
        }
    )
    banded = score_file.sort_into_bands(rows, HEAD)
    for name, data in zip(("places", "samples"), sample_locations.write_locations(table, banded, "u"), strict=True):
        (folder / f"{name}.parquet").write_bytes(data)
    return table, banded


def locate_samples(folder: Path, codes: U64) -> tuple[pa.Table, int]:
    """Locate samples of the shard group and return the bytes that were read."""
    return sample_locations.locate_samples(make_receipt(folder), codes)


def make_receipt(folder: Path) -> ShardGroupReceipt:
    """Return the receipt of the shard group, which names the files of its locations."""
    counts = [
        ShardAccounting(shard=name, digest=name, listed=SAMPLES // 2, scored=SAMPLES // 2, failed={}) for name in "ab"
    ]
    return ShardGroupReceipt(
        stage="score", digest="u", folder=str(folder), seconds=0, teacher="t", pod=0, scores="", shards=counts,
        places=str(folder / "places.parquet"),
        samples=str(folder / "samples.parquet"), failures=[], clocks=PartSeconds(),
    )  # fmt: skip


@pytest.mark.parametrize("last_band", [0, 1, 2, 4])
def test_samples_are_located_in_the_requested_order(tmp_path: Path, last_band: int) -> None:
    table, banded = write_shard_group(tmp_path)
    within = banded.rows.sample[banded.band <= last_band]
    codes = np.random.default_rng(1).permutation(np.append(within, within[:5]))
    rows = {row["sample"]: row for row in table.to_pylist()}
    assert locate_samples(tmp_path, codes)[0].to_pylist() == [rows[code] for code in codes.tolist()]


def test_the_best_are_located_without_reading_the_rest(tmp_path: Path) -> None:
    _, banded = write_shard_group(tmp_path)
    samples_bytes = (tmp_path / "samples.parquet").stat().st_size
    read_bytes = [locate_samples(tmp_path, banded.rows.sample[banded.band <= band])[1] for band in (0, 1, 2, 3)]
    assert read_bytes[0] < read_bytes[1] < read_bytes[2] < samples_bytes < read_bytes[3]


def test_a_places_file_that_lost_rows_costs_reads_and_changes_nothing(tmp_path: Path) -> None:
    _, banded = write_shard_group(tmp_path)
    codes = banded.rows.sample[banded.band <= 1]
    before, bytes_before = locate_samples(tmp_path, codes)
    truncate_rows(tmp_path / "places.parquet", 10)
    after, bytes_after = locate_samples(tmp_path, codes)
    assert after == before
    assert bytes_after > bytes_before


@pytest.mark.parametrize("how", ["gone", "empty", "cut off", "overwritten", "another unit's"])
@pytest.mark.parametrize("name", ["places", "samples"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    table, _ = write_shard_group(tmp_path)
    damage(tmp_path / f"{name}.parquet", how)
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/{name}\.parquet: .+ {tmp_path} .*SEMI-E027") as refusal:
        locate_samples(tmp_path, table["sample"].to_numpy())
    assert "\n" not in str(refusal.value)


def test_a_samples_file_that_lost_rows_is_refused(tmp_path: Path) -> None:
    table, _ = write_shard_group(tmp_path)
    damage(tmp_path / "samples.parquet", "rows lost")
    with pytest.raises(SemiscaleError, match=r"samples\.parquet: .*10 rows.* 3,000 images.*SEMI-E027"):
        locate_samples(tmp_path, table["sample"].to_numpy())
