"""Examples of images of the pool that could not be scored, from the receipts of the scanned units."""

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
    """Return up to MAX_EXAMPLES failures, in the order of the units.

    Reads unit receipts until it has enough: none where nothing failed, at most all of them (a thousand or so).
    """
    wanted = min(MAX_EXAMPLES, run.selection.ledger.failed)
    if not wanted:
        return []
    units: list[dict[str, Any]] = json.loads(storage.read_bytes(run.plan.units))
    folder = run.scores[0].folder  # all pods write to their teacher's folder
    receipts = (
        load_document(storage.join(folder, unit["digest"], "receipt.json"), ShardGroupReceipt) for unit in units
    )
    return list(islice((failure for receipt in receipts for failure in receipt.failures), wanted))
