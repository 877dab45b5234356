"""Test the score file: bands, order, ties, and the requests for a band."""

import hashlib
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.scores import score_file
from semiscale.scores.score_file import ScoreFileReader, ScoreRows
from semiscale.storage import parquet_row_groups

CLASSES = 5


def make_rows(count: int, seed: int = 0) -> ScoreRows:
    """Return rows with many ties, a Zipf distribution of classes and an empty class."""
    rng = np.random.default_rng(seed)
    label = np.minimum(rng.zipf(1.5, count) - 1, CLASSES - 2).astype(np.uint16)
    sample = score_file.encode_sample_ids(0, np.arange(count))
    tie = score_file.tie_breakers(sample, ["a.tar"])
    score = rng.integers(-3, 3, count).astype(np.float32)
    return ScoreRows(label, score, sample, np.zeros(count, np.uint8), tie)


def write_and_open(rows: ScoreRows, folder: Path, head: int) -> ScoreFileReader:
    """Write the score file of a shard group and open it."""
    path = folder / "scores.parquet"
    metadata = {"teacher": "t", "unit": "u", "shards": ["a.tar"]}
    path.write_bytes(score_file.write_score_file(score_file.sort_into_bands(rows, head), CLASSES, metadata))
    return ScoreFileReader(str(path))


def test_bands_have_the_ranks_in_order(tmp_path: Path) -> None:
    rows, head = make_rows(1000), 8
    reader = write_and_open(rows, tmp_path, head)
    order = sorted(range(1000), key=lambda row: (rows.label[row], -rows.score[row], rows.tie[row]))
    expected = {label: [rows.sample[row] for row in order if rows.label[row] == label] for label in range(CLASSES)}
    start, end, width = 0, head, head // 4
    while reader.has_unread_rows(1).any():
        band = reader.read_next_band()
        for label in range(CLASSES):
            assert band.sample[band.label == label].tolist() == expected[label][start:end]
        assert reader.has_unread_rows(1).tolist() == [len(expected[label]) > end for label in range(CLASSES)]
        start, end, width = end, end + width, 2 * width
    assert start >= max(map(len, expected.values())) > 100


def test_the_last_scores_bound_the_following_bands(tmp_path: Path) -> None:
    reader = write_and_open(make_rows(500), tmp_path, 4)
    reader.read_next_band()
    bound = reader.last_scores.copy()
    following = reader.read_next_band()
    assert (following.score <= bound[following.label]).all()


def test_ties_depend_only_on_the_name_of_the_shard() -> None:
    names = ["a.tar", "b.tar"]
    both = score_file.tie_breakers(np.array([3, (1 << 32) | 3], np.uint64), names)
    assert both[0] != both[1]
    assert both[1] == score_file.tie_breakers(np.array([3], np.uint64), ["b.tar"])[0]


def test_scores_are_sorted_as_floats() -> None:
    values = np.array([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 7, np.inf], np.float32)
    rows = ScoreRows(*(np.zeros(8, kind) for kind in ("u2", "f4", "u8", "u1", "u8")))
    shuffled = ScoreRows(rows.label, values[[3, 7, 0, 5, 2, 6, 1, 4]], rows.sample, rows.position, rows.tie)
    assert shuffled.take(score_file.argsort_best_per_class(shuffled)).score.tolist() == sorted(
        values.tolist(), reverse=True
    )


def test_a_position_is_unread_until_its_last_row_is_read(tmp_path: Path) -> None:
    # Class 0 has first choices in its best ten ranks and second choices below. Class 1 has only second choices.
    count = 100
    label = np.repeat(np.array([0, 1], np.uint16), count)
    position = (np.arange(2 * count) >= 10).astype(np.uint8)
    sample = score_file.encode_sample_ids(0, np.arange(2 * count))
    score = -np.arange(2 * count, dtype=np.float32)
    reader = write_and_open(ScoreRows(label, score, sample, position, sample), tmp_path, 8)
    assert reader.has_unread_rows(1).tolist() == [True, False, False, False, False]
    assert reader.has_unread_rows(2).tolist() == reader.has_unread_rows(9).tolist() == [True, True, False, False, False]
    reader.read_next_band()
    # Ranks 8 and 9 of class 0 are unread.
    assert reader.has_unread_rows(1)[0]
    reader.read_next_band()
    assert not reader.has_unread_rows(1).any()
    assert reader.has_unread_rows(2).tolist() == [True, True, False, False, False]


def test_a_band_takes_a_single_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []
    read = storage.read_bytes

    def count_request(uri: str, start: int = 0, size: int | None = None) -> bytes:
        requests.append(size)
        return read(uri, start, size)

    monkeypatch.setattr(storage, "read_bytes", count_request)
    reader = write_and_open(make_rows(20_000), tmp_path, 16)
    assert requests == [parquet_row_groups.TAIL_BYTES]
    reader.read_next_band()
    reader.read_next_band()
    assert len(requests) == 3
    assert reader.bytes_read == sum(filter(None, requests))


def test_a_footer_can_be_longer_than_the_first_request(tmp_path: Path) -> None:
    names = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(1000)]
    path = tmp_path / "scores.parquet"
    path.write_bytes(
        score_file.write_score_file(
            score_file.sort_into_bands(make_rows(100), 4), CLASSES, {"teacher": "t", "unit": "u", "shards": names}
        )
    )
    reader = ScoreFileReader(str(path))
    assert reader.shard_names == names
    assert reader.bytes_read > parquet_row_groups.TAIL_BYTES
    assert len(reader.read_next_band()) > 0


def test_duckdb_can_read_a_score_file(tmp_path: Path) -> None:
    rows = make_rows(1000)
    write_and_open(rows, tmp_path, 8)
    with duckdb.connect() as connection:
        query = f"select class, sample, score from '{tmp_path}/*.parquet' order by sample"
        records = connection.execute(query).fetchall()
    assert records == list(zip(rows.label.tolist(), rows.sample.tolist(), rows.score.tolist(), strict=True))


def test_bands_double_after_a_narrow_band() -> None:
    assert np.flatnonzero(np.diff(score_file.band_of_rank(np.arange(200), 33))).tolist() == [32, 40, 56, 88, 152]
    assert score_file.band_of_rank(np.arange(9), 1).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("images_per_class", "groups", "head"),
    [(16_000, 1000, 33), (1600, 1000, 8), (1, 1000, 2), (160, 2, 107), (16, 2, 17), (16, 1, 17)],
)
def test_the_first_band_covers_the_expected_share_of_k(images_per_class: int, groups: int, head: int) -> None:
    assert score_file.first_band_size(images_per_class, groups) == head


def test_a_shard_group_without_images_has_a_score_file(tmp_path: Path) -> None:
    no_rows = make_rows(10).take(np.zeros(10, bool))
    reader = write_and_open(no_rows, tmp_path, 4)
    assert not reader.has_unread_rows(1).any()


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InvalidInputError, match=r"other\.parquet: .*SEMI-E160"):
        ScoreFileReader(str(tmp_path / "other.parquet"))
