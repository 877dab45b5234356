"""Store the scores of each shard, and build the files of shard groups from them.

An object is named by the shard's digest and written in one request. It is not deleted after the group is compacted. If
a shard changes, its group is built again from the stored scores of the other shards.
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

# Failures that are listed for a shard, and for a shard group. All failures are counted.
MAX_FAILURES_LISTED = 100


@dataclass(frozen=True)
class ShardScores:
    """The scores of one shard.

    Attributes:
        count: Accounting of the shard.
        failures: The first samples that have no scores.
        seconds: Seconds that the scan took.
        samples: One row per scored image, with the columns index, key, uri, offset and size_bytes.
        labels_BP: Best classes of each scored image, best first.
        scores_BP: Log-odds of these classes.
    """

    count: ShardAccounting
    failures: list[BadSample]
    seconds: float
    samples: pa.Table
    labels_BP: NDArray[np.uint16]
    scores_BP: NDArray[np.float32]

    def to_parquet(self, teacher: str) -> bytes:
        """Return the scores as a Parquet file.

        Args:
            teacher: Digest of the teacher, which the metadata names.
        """
        started = time.monotonic()
        num_kept = self.labels_BP.shape[1]
        columns = {
            "labels": pa.FixedSizeListArray.from_arrays(pa.array(self.labels_BP.ravel()), num_kept),
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(self.scores_BP.ravel()), num_kept),
        }
        table = self.samples
        for name, column in columns.items():
            table = table.append_column(name, column)

        def metadata() -> dict[str, str]:
            # The clocks include the time of encoding, so they are read after it.
            clocks = self.count.clocks.model_copy(update={"write": round(time.monotonic() - started, 3)})
            header = {
                "count": self.count.model_copy(update={"clocks": clocks}).model_dump(),
                "failures": [failure.model_dump() for failure in self.failures],
                "seconds": self.seconds,
                "teacher": teacher,
            }
            return {"semiscale": json.dumps(header), "kept": str(num_kept)}

        return encode_parquet(table, metadata=metadata, compression="zstd")


def shard_scores_uri(folder: str, shard: Shard) -> str:
    """Return the URI of a shard's scores.

    Args:
        folder: URI of the score folder.
        shard: The shard.
    """
    return storage.join(folder, "parts", f"{shard.digest()}.parquet")


def corrupt_scores_error(uri: str, why: str) -> SemiscaleError:
    """Return the error for stored scores that cannot be used.

    Args:
        uri: URI of the stored scores. After it is deleted, the shard is scored again.
        why: Sentence without a full stop that says what is wrong.
    """
    return SemiscaleError("SEMI-E273", f"{uri}: {why}. Delete this object and run the scoring again.")


def shard_scores_from_parquet(data: bytes, uri: str, teacher: str) -> ShardScores:
    """Read the stored scores of a shard.

    Args:
        data: Content of the object.
        uri: URI of the object, for errors.
        teacher: Digest of the teacher that the scores must be by.

    Raises:
        SemiscaleError: The file is damaged, is by another teacher, or does not have as many rows as were scored.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        table, metadata = file.read(), file.metadata.metadata or {}
        header, num_kept = json.loads(metadata[b"semiscale"]), int(metadata[b"kept"])
    # The errors of Arrow are subclasses of these.
    except (ValueError, OSError, LookupError) as error:
        raise corrupt_scores_error(uri, f"The file is damaged: {str(error).partition(chr(10))[0]}") from None
    if header.get("teacher") != teacher:
        raise corrupt_scores_error(
            uri, f"It holds scores by teacher {header.get('teacher', 'unknown')}, expected {teacher}"
        )
    labels, log_odds = (table[name].combine_chunks().flatten().to_numpy() for name in ("labels", "scores"))
    count = ShardAccounting.model_validate(header["count"])
    if table.num_rows != count.scored:
        raise corrupt_scores_error(
            uri, f"It holds {table.num_rows} samples of shard {count.shard}, expected {count.scored}"
        )
    return ShardScores(
        count=count,
        failures=[BadSample.model_validate(failure) for failure in header["failures"]],
        seconds=header["seconds"],
        samples=table.drop_columns(["labels", "scores"]).replace_schema_metadata(None),
        labels_BP=labels.reshape(-1, num_kept),
        scores_BP=log_odds.reshape(-1, num_kept),
    )


def build_group_files(
    parts: Sequence[ShardScores], head: int, classes: int, metadata: dict[str, Any]
) -> dict[str, bytes]:
    """Build the files of a shard group.

    Args:
        parts: Scores of the group's shards, in order.
        head: Number of ranks in the first band of each class.
        classes: Number of the teacher's classes.
        metadata: Metadata of the score file.

    Returns:
        Files by name: `scores` has the rows in bands, `places` the locations of the best images, and `samples` those of
        all images.

    Cost:
        6.5 GB and 52 CPU-seconds for eight million images at ten classes each, with `parts`.
    """
    rows = score_file.sort_into_bands(group_rows(parts), head)
    files = {"scores": score_file.write_score_file(rows, classes, metadata)}
    files["places"], files["samples"] = sample_locations.write_locations(group_samples(parts), rows, metadata["unit"])
    return files


def group_rows(parts: Sequence[ShardScores]) -> ScoreRows:
    """Return all rows of a shard group, unsorted.

    Shards are numbered in the order of `parts`.
    """
    sample_ids = _sample_ids(parts)
    num_kept = parts[0].labels_BP.shape[1]
    return ScoreRows(
        label=np.concatenate([part.labels_BP for part in parts]).ravel(),
        score=np.concatenate([part.scores_BP for part in parts]).ravel(),
        sample=np.repeat(sample_ids, num_kept),
        position=np.tile(np.arange(num_kept, dtype=np.uint8), len(sample_ids)),
        tie=np.repeat(score_file.tie_breakers(sample_ids, [part.count.shard for part in parts]), num_kept),
    )


def group_samples(parts: Sequence[ShardScores]) -> pa.Table:
    """Return the samples of a shard group and their locations, in the order of ids."""
    table = pa.concat_tables([part.samples for part in parts]).drop_columns(["index"])
    return table.add_column(0, "sample", pa.array(_sample_ids(parts)))


def _sample_ids(parts: Sequence[ShardScores]) -> score_file.U64:
    return np.concatenate(
        [score_file.encode_sample_ids(number, part.samples["index"].to_numpy()) for number, part in enumerate(parts)]
    )
