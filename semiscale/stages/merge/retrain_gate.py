"""Renewal: whether a round of scheduled retraining trains on a fresh D̂ or stays with the one of an earlier round.

A pool that grows changes D̂ a little every night. As long as no more than `retrain_above` of it changed, the selection
of the earlier round is handed on: all that follows was done for it, is found finished, and nothing is trained. The
comparison is with the D̂ that was last handed on, so that small changes add up and are acted upon in the end.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.observability.progress import log_info
from semiscale.receipts.merge import RetrainDecision, SelectionReceipt

ROWS_PER_BATCH = 1 << 20  # rows read at a time

Unsigned = NDArray[np.unsignedinteger[Any]]


def keep_or_replace(fresh: SelectionReceipt, workdir: str, family: str, retrain_above: float) -> SelectionReceipt:
    """Return the selection that this round goes on with, and remember it: the fresh one, or the earlier one.

    `family` identifies all that selections must share to stand in for each other: the run, the teacher, K, P, the list
    of removed keys; everything but the pool. An earlier selection comes with the fresh ledger: the pool was scanned.
    """
    uri = storage.join(workdir, "stages", "merge", "settled", f"{family}.json")
    earlier = _previous_selection(uri)
    if earlier is None or earlier.digest == fresh.digest:
        if earlier:
            log_info("merge", "the selection is the one that was last handed on: nothing new to train on")
        storage.write_bytes(uri, fresh.model_dump_json(indent=1).encode())
        return fresh
    changed = fraction_changed(earlier.selection, fresh.selection)
    kept = changed <= retrain_above
    found = f"{changed:.2%} of the selection changed, retrain_above is {retrain_above:.2%}"
    log_info("merge", f"{found}: {'the earlier one is kept, there is nothing to train' if kept else 'training anew'}")
    renewal = RetrainDecision(changed=round(changed, 6), retrain_above=retrain_above, kept=kept)
    if not kept:
        storage.write_bytes(uri, fresh.model_dump_json(indent=1).encode())
        return fresh.model_copy(update={"renewal": renewal})
    news = ("ledger", "shards", "failed", "removal", "bytes_read", "seconds")
    return earlier.model_copy(update={**{name: getattr(fresh, name) for name in news}, "renewal": renewal})


def _previous_selection(uri: str) -> SelectionReceipt | None:
    """Return the selection last handed on; None where there is none, where it is gone or of another version."""
    data = storage.read_or_none(uri)
    if data is None:
        return None
    try:
        receipt = SelectionReceipt.model_validate_json(data)
    except ValueError:
        return None
    return receipt if storage.head(receipt.selection) else None


def fraction_changed(earlier: str, fresh: str) -> float:
    """Return the share of D̂'s rows that came or went, whichever is more, of the larger of the two: in [0, 1].

    A row is a class and an image, known by its shard and its place there. Costs 0.4 CPU-seconds and 100 MB a million
    rows of each.
    """
    numbers: dict[str, int] = {}
    tables = [_rows(uri, numbers) for uri in (earlier, fresh)]
    classes = 1 + max(int(label.max()) for label, _, _ in tables)
    before, now = (_codes(label, number, index, classes) for label, number, index in tables)
    same = len(np.intersect1d(before, now, assume_unique=True))
    return 1 - same / max(len(before), len(now))


def _rows(uri: str, numbers: dict[str, int]) -> list[Unsigned]:
    """Read class, number of the shard and index of every row; shards are numbered as they come up."""
    parts = []
    with storage.open_object(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH, columns=["class", "shard", "index"]):
            shard = batch["shard"].cast(pa.string()).dictionary_encode()
            known = [numbers.setdefault(name, len(numbers)) for name in shard.dictionary.to_pylist()]
            number = np.array(known, np.uint32)[shard.indices.to_numpy()]
            parts.append((batch["class"].to_numpy(), number, batch["index"].to_numpy().astype(np.uint32)))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _codes(label: Unsigned, number: Unsigned, index: Unsigned, classes: int) -> Unsigned:
    """Return a number for each row; classes x shards is below 2^32, and so is an index."""
    place = number.astype(np.uint64) * np.uint64(classes) + label
    return (place << np.uint64(32)) | index
