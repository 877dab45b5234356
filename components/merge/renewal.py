"""Renewal: whether a round of scheduled retraining trains on a fresh D̂ or stays with the one of an earlier round.

A pool that grows changes D̂ a little every night. As long as no more than `retrain_above` of it changed, the selection
of the earlier round is handed on: all that follows was done for it, is found finished, and nothing is trained. The
comparison is with the D̂ that was last handed on, so that small changes add up and are acted upon in the end.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.shared import storage
from components.shared.progress import say
from components.shared.receipts import Renewal, SelectionReceipt


def settled(fresh: SelectionReceipt, workdir: str, family: str, retrain_above: float) -> SelectionReceipt:
    """Return the selection that this round goes on with, and remember it: the fresh one, or the earlier one.

    `family` identifies all that selections must share to stand in for each other: the run, the teacher, K, P, the list
    of removed keys; everything but the pool. An earlier selection comes with the fresh ledger: the pool was scanned.
    """
    uri = storage.join(workdir, "stages", "merge", "settled", f"{family}.json")
    earlier = _earlier(uri)
    if earlier is None or earlier.digest == fresh.digest:
        storage.write(uri, fresh.model_dump_json(indent=1).encode())
        return fresh
    changed = share_changed(rows_of(earlier.selection), rows_of(fresh.selection))
    kept = changed <= retrain_above
    found = f"{changed:.2%} of the selection changed, retrain_above is {retrain_above:.2%}"
    say("merge", f"{found}: {'the earlier one is kept, there is nothing to train' if kept else 'training anew'}")
    renewal = Renewal(changed=round(changed, 6), retrain_above=retrain_above, kept=kept)
    if not kept:
        storage.write(uri, fresh.model_dump_json(indent=1).encode())
        return fresh.model_copy(update={"renewal": renewal})
    news = {"ledger": fresh.ledger, "failed": fresh.failed, "bytes_read": fresh.bytes_read, "seconds": fresh.seconds}
    return earlier.model_copy(update={**news, "renewal": renewal})


def _earlier(uri: str) -> SelectionReceipt | None:
    """Return the selection last handed on; None where there is none, where it is gone or of another version."""
    data = storage.read_if_there(uri)
    if data is None:
        return None
    try:
        receipt = SelectionReceipt.model_validate_json(data)
    except ValueError:
        return None
    return receipt if storage.stat(receipt.selection) else None


def rows_of(uri: str) -> pa.Table:
    """Read what identifies a row of D̂: its class, and the image by its shard and its place there."""
    return pq.read_table(io.BytesIO(storage.read(uri)), columns=["class", "shard", "index"], read_dictionary=["shard"])


def share_changed(earlier: pa.Table, fresh: pa.Table) -> float:
    """Return the share of D̂'s rows that came or went, whichever is more, of the larger of the two: in [0, 1].

    Time: a sort of the rows. Memory: 60 bytes a row.
    """
    earlier_codes, fresh_codes = codes([earlier, fresh])
    same = len(np.intersect1d(earlier_codes, fresh_codes, assume_unique=True))
    return 1 - same / max(len(earlier), len(fresh))


def codes(tables: list[pa.Table]) -> list[NDArray[np.uint64]]:
    """Return a number for each row, equal where class, shard and index are."""
    shards = pa.chunked_array([chunk.cast(pa.string()) for table in tables for chunk in table["shard"].chunks])
    encoded = shards.dictionary_encode().combine_chunks()
    number = np.concatenate([chunk.indices.to_numpy() for chunk in getattr(encoded, "chunks", [encoded])])
    label = np.concatenate([table["class"].to_numpy() for table in tables]).astype(np.uint64)
    index = np.concatenate([table["index"].to_numpy() for table in tables]).astype(np.uint64)
    place = label * np.uint64(number.max() + 1) + number.astype(np.uint64)  # classes x shards: far below 2^32
    return np.split((place << np.uint64(32)) | index, [len(tables[0])])
