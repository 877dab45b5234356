"""How the network runs on a run's GPUs: decided by the pod that is first, by trying, and followed by all others.

Memory formats and compiled graphs add in other orders: pods that each chose for themselves would leave scores of other
bits. What the first has written stays, also for the pods that score what is new in the pool later.
"""

from collections.abc import Callable

from semiscale import storage
from semiscale.observability.progress import log_info
from semiscale.storage.documents import StrictDocument


class ExecutionMode(StrictDocument):
    """`layout` is a place in Scorer.layouts; `on` says which card and software it was tried on."""

    layout: int
    compiled: bool
    on: str


def load_or_decide(folder: str, on: str, decide: Callable[[], ExecutionMode]) -> ExecutionMode:
    """Return the decision that a score folder has; where it has none, decide, and write it unless another was first.

    Says so where it was made on another card or software: then the bits of the scores differ whatever is decided.
    """
    uri = storage.join(folder, "decision.json")
    found = storage.read_or_none(uri)
    if found is None:
        storage.write_bytes(uri, decide().model_dump_json().encode(), if_absent=True)
        found = storage.read_bytes(uri)
    decision = ExecutionMode.model_validate_json(found)
    if decision.on != on:
        log_info(
            "score", f"this pod has {on}, but {decision.on} scored before it: equal images may differ in the last bits"
        )
    return decision
