"""The places of a unit's samples: the winners' are found by reading as many bands as the selection read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.shared import places, scores
from components.shared.scores import U64, Rows

SAMPLES, CLASSES, HEAD = 3000, 4, 20


def unit(folder: Path) -> tuple[pa.Table, scores.Banded]:
    """Write the places of a unit of two shards, every image in two of four classes."""
    rng = np.random.default_rng(0)
    codes = np.concatenate([scores.sample_codes(shard, np.arange(SAMPLES // 2)) for shard in (0, 1)])
    label = np.column_stack([rng.integers(0, 2, SAMPLES), rng.integers(2, CLASSES, SAMPLES)])
    tie = scores.ties(codes, ["a.tar", "b.tar"])
    rows = Rows(
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
    banded = scores.banded(rows, HEAD)
    for name, data in zip(("places", "samples"), places.encode(table, banded), strict=True):
        (folder / f"{name}.parquet").write_bytes(data)
    return table, banded


def found(folder: Path, codes: U64) -> tuple[pa.Table, int]:
    """Look samples up."""
    return places.find(str(folder / "places.parquet"), str(folder / "samples.parquet"), codes)


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
