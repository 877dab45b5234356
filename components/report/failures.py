"""Examples of images of the pool that could not be scored, from the receipts of the scanned units."""

import json
from itertools import islice
from typing import Any

from components.report.run import Run
from components.shared import storage
from components.shared.receipts import Failure, UnitReceipt, load

MAX_EXAMPLES = 20


def examples(run: Run) -> list[Failure]:
    """Return up to MAX_EXAMPLES failures, in the order of the units.

    Reads unit receipts until it has enough: none where nothing failed, at most all of them (a thousand or so).
    """
    wanted = min(MAX_EXAMPLES, run.selection.ledger.failed)
    if not wanted:
        return []
    units: list[dict[str, Any]] = json.loads(storage.read(run.plan.units))
    folder = run.scores[0].folder  # all pods write to their teacher's folder
    receipts = (load(storage.join(folder, unit["digest"], "receipt.json"), UnitReceipt) for unit in units)
    return list(islice((failure for receipt in receipts for failure in receipt.failures), wanted))
