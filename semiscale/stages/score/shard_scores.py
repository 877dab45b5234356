"""A part: the scores of one shard, committed whole, named by the shard's digest, and kept.

A unit's files are put together from its parts, and again when one of its shards has changed.
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data.shard import Shard
from semiscale.receipts.base import BadSample
from semiscale.receipts.score import ShardAccounting
from semiscale.scores import sample_locations, score_file
from semiscale.scores.score_file import ScoreRows
from semiscale.storage.parquet import encode_parquet


@dataclass(frozen=True)
class ShardScores:
    """One shard's scores. `samples` has one row a scored image: index, key, uri, offset, size_bytes; `labels_BP` and
    `scores_BP` are its best classes, best first. `seconds` is how long its scan took.
    """

    count: ShardAccounting
    failures: list[BadSample]
    seconds: float
    samples: pa.Table
    labels_BP: NDArray[np.uint16]
    scores_BP: NDArray[np.float32]

    def to_parquet(self, teacher: str) -> bytes:
        """Return the part as a Parquet file that says whose scores it holds."""
        started = time.monotonic()
        kept = self.labels_BP.shape[1]
        columns = {
            "labels": pa.FixedSizeListArray.from_arrays(pa.array(self.labels_BP.ravel()), kept),
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(self.scores_BP.ravel()), kept),
        }
        table = self.samples
        for name, column in columns.items():
            table = table.append_column(name, column)

        def metadata() -> dict[str, str]:
            # The clocks include the time of encoding, so they are read after it.
            clocks = self.count.clocks.model_copy(update={"write": round(time.monotonic() - started, 3)})
            described = {
                "count": self.count.model_copy(update={"clocks": clocks}).model_dump(),
                "failures": [failure.model_dump() for failure in self.failures],
                "seconds": self.seconds,
                "teacher": teacher,
            }
            return {"semiscale": json.dumps(described), "kept": str(kept)}

        return encode_parquet(table, metadata=metadata, compression="zstd")


def shard_scores_uri(folder: str, shard: Shard) -> str:
    """Return where a shard's scores are kept."""
    return storage.join(folder, "parts", f"{shard.digest()}.parquet")


def corrupt_scores_error(uri: str, why: str) -> SemiscaleError:
    """Return the error of a part that cannot be sealed: without it, its shard is scored again."""
    return SemiscaleError("SEMI-E273", f"{uri}: {why}. Delete this object and run the scoring again.")


def shard_scores_from_parquet(data: bytes, uri: str, teacher: str) -> ShardScores:
    """Read a part back. Raises SemiscaleError where it is damaged, of another teacher, or has another number of samples
    than were scored.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        table, metadata = file.read(), file.metadata.metadata or {}
        described, kept = json.loads(metadata[b"semiscale"]), int(metadata[b"kept"])
    except (ValueError, OSError, LookupError) as error:  # Arrow's errors are among them
        raise corrupt_scores_error(uri, f"The file is damaged: {str(error).partition(chr(10))[0]}") from None
    if described.get("teacher") != teacher:
        raise corrupt_scores_error(
            uri, f"It holds scores by teacher {described.get('teacher', 'unknown')}, expected {teacher}"
        )
    labels, log_odds = (table[name].combine_chunks().flatten().to_numpy() for name in ("labels", "scores"))
    count = ShardAccounting.model_validate(described["count"])
    if table.num_rows != count.scored:
        raise corrupt_scores_error(
            uri, f"It holds {table.num_rows} samples of shard {count.shard}, expected {count.scored}"
        )
    return ShardScores(
        count=count,
        failures=[BadSample.model_validate(failure) for failure in described["failures"]],
        seconds=described["seconds"],
        samples=table.drop_columns(["labels", "scores"]).replace_schema_metadata(None),
        labels_BP=labels.reshape(-1, kept),
        scores_BP=log_odds.reshape(-1, kept),
    )


def build_group_files(
    parts: Sequence[ShardScores], head: int, classes: int, metadata: dict[str, Any]
) -> dict[str, bytes]:
    """Return a unit's files by name: its rows in bands of `head` ranks, the places of the best, all its samples.

    Memory and time: 6.5 GB and 52 CPU-seconds for eight million images at ten classes each, with the parts.
    """
    unit = score_file.sort_into_bands(group_rows(parts), head)
    files = {"scores": score_file.write_score_file(unit, classes, metadata)}
    files["places"], files["samples"] = sample_locations.write_locations(group_samples(parts), unit, metadata["unit"])
    return files


def group_rows(parts: Sequence[ShardScores]) -> ScoreRows:
    """Return all rows of a unit, unsorted; its shards are numbered in the order of the parts."""
    codes = _codes(parts)
    kept = parts[0].labels_BP.shape[1]
    return ScoreRows(
        label=np.concatenate([part.labels_BP for part in parts]).ravel(),
        score=np.concatenate([part.scores_BP for part in parts]).ravel(),
        sample=np.repeat(codes, kept),
        position=np.tile(np.arange(kept, dtype=np.uint8), len(codes)),
        tie=np.repeat(score_file.tie_breakers(codes, [part.count.shard for part in parts]), kept),
    )


def group_samples(parts: Sequence[ShardScores]) -> pa.Table:
    """Return the unit's samples in the order of their codes, each with its place."""
    table = pa.concat_tables([part.samples for part in parts]).drop_columns(["index"])
    return table.add_column(0, "sample", pa.array(_codes(parts)))


def _codes(parts: Sequence[ShardScores]) -> score_file.U64:
    return np.concatenate(
        [score_file.encode_sample_ids(number, part.samples["index"].to_numpy()) for number, part in enumerate(parts)]
    )
