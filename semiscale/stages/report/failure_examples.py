"""Collect examples of images that could not be scored, from the shard groups' receipts."""

import json
from itertools import islice
from typing import Any

from semiscale import storage
from semiscale.receipts.base import BadSample
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.stages.report.run_receipts import RunReceipts
from semiscale.storage.documents import load_document

MAX_EXAMPLES = 20


def failure_examples(run: RunReceipts) -> list[BadSample]:
    """Return up to MAX_EXAMPLES failures, in the order of the shard groups.

    Cost:
        Reads receipts of shard groups until there are enough examples. It reads none if no image failed, and at most
        all of them, about a thousand.
    """
    count = min(MAX_EXAMPLES, run.selection.ledger.failed)
    if not count:
        return []
    groups: list[dict[str, Any]] = json.loads(storage.read_bytes(run.plan.units))
    # All pods write to the folder of their teacher.
    folder = run.scores[0].folder
    receipts = (
        load_document(storage.join(folder, group["digest"], "receipt.json"), ShardGroupReceipt) for group in groups
    )
    return list(islice((failure for receipt in receipts for failure in receipt.failures), count))
