"""The places of a unit's samples: the winners' are found by reading as many bands as the selection read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale.common.errors import SemiscaleError
from semiscale.receipts.score import PartSeconds, ShardAccounting, ShardGroupReceipt
from semiscale.scores import sample_locations, score_file
from semiscale.scores.score_file import U64, ScoreRows

SAMPLES, CLASSES, HEAD = 3000, 4, 20


def unit(folder: Path) -> tuple[pa.Table, score_file.BandedRows]:
    """Write the places of a unit of two shards, every image in two of four classes."""
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


def found(folder: Path, codes: U64) -> tuple[pa.Table, int]:
    """Look samples up."""
    return sample_locations.locate_samples(receipt(folder), codes)


def receipt(folder: Path) -> ShardGroupReceipt:
    """The receipt of the unit, as far as its places go."""
    counts = [
        ShardAccounting(shard=name, digest=name, listed=SAMPLES // 2, scored=SAMPLES // 2, failed={}) for name in "ab"
    ]
    return ShardGroupReceipt(
        stage="score", digest="u", folder=str(folder), seconds=0, teacher="t", pod=0, scores="", shards=counts,
        places=str(folder / "places.parquet"),
        samples=str(folder / "samples.parquet"), failures=[], clocks=PartSeconds(),
    )  # fmt: skip


@pytest.mark.parametrize("last_band", [0, 1, 2, 4])
def test_samples_are_found_in_the_order_asked_for(tmp_path: Path, last_band: int) -> None:
    table, banded = unit(tmp_path)
    within = banded.rows.sample[banded.band <= last_band]
    codes = np.random.default_rng(1).permutation(np.append(within, within[:5]))
    rows = {row["sample"]: row for row in table.to_pylist()}
    assert found(tmp_path, codes)[0].to_pylist() == [rows[code] for code in codes.tolist()]


def test_the_best_are_found_without_reading_the_rest(tmp_path: Path) -> None:
    _, banded = unit(tmp_path)
    samples_bytes = (tmp_path / "samples.parquet").stat().st_size
    read = [found(tmp_path, banded.rows.sample[banded.band <= band])[1] for band in (0, 1, 2, 3)]
    assert read[0] < read[1] < read[2] < samples_bytes < read[3]


def rewritten(path: Path, rows: int) -> None:
    """Write a Parquet file again with the same footer and fewer rows."""
    file = pq.ParquetFile(path)
    table = file.read().slice(0, rows)
    kept = {name.decode(): value.decode() for name, value in file.metadata.metadata.items()}
    with pq.ParquetWriter(path, table.schema.remove_metadata(), store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(kept)


def test_places_that_lost_rows_cost_time_and_change_nothing(tmp_path: Path) -> None:
    _, banded = unit(tmp_path)
    codes = banded.rows.sample[banded.band <= 1]
    before, read = found(tmp_path, codes)
    rewritten(tmp_path / "places.parquet", 10)
    after, read_then = found(tmp_path, codes)
    assert after == before
    assert read_then > read


def damage(path: Path, how: str) -> None:
    """Lose a file, cut it, lose some of its rows, overwrite some of its bytes or make it another unit's."""
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "rows lost":
        rewritten(path, 10)
    elif how == "overwritten":
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    else:
        path.write_bytes(data.replace(b"semiscale.unit\x18\x01u", b"semiscale.unit\x18\x01v"))


@pytest.mark.parametrize("how", ["gone", "empty", "cut off", "overwritten", "another unit's"])
@pytest.mark.parametrize("name", ["places", "samples"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    table, _ = unit(tmp_path)
    damage(tmp_path / f"{name}.parquet", how)
    with pytest.raises(SemiscaleError, match=rf"^{tmp_path}/{name}\.parquet: .+ {tmp_path} .*SEMI-E027") as it:
        found(tmp_path, table["sample"].to_numpy())
    assert "\n" not in str(it.value)


def test_samples_that_lost_rows_are_refused(tmp_path: Path) -> None:
    table, _ = unit(tmp_path)
    damage(tmp_path / "samples.parquet", "rows lost")
    with pytest.raises(SemiscaleError, match=r"samples\.parquet: .*10 rows.* 3,000 images.*SEMI-E027"):
        found(tmp_path, table["sample"].to_numpy())
