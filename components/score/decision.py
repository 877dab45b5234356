"""How the network runs on a run's GPUs: decided by the pod that is first, by trying, and followed by all others.

Memory formats and compiled graphs add in other orders: pods that each chose for themselves would leave scores of other
bits. What the first has written stays, also for the pods that score what is new in the pool later.
"""

from collections.abc import Callable

from components.shared import storage
from components.shared.progress import say
from components.shared.receipts import Document


class Decision(Document):
    """`layout` is a place in Scorer.layouts; `on` says which card and software it was tried on."""

    layout: int
    compiled: bool
    on: str


def settled(folder: str, on: str, decide: Callable[[], Decision]) -> Decision:
    """Return the decision that a score folder has; where it has none, decide, and write it unless another was first.

    Says so where it was made on another card or software: then the bits of the scores differ whatever is decided.
    """
    uri = storage.join(folder, "decision.json")
    found = storage.read_if_there(uri)
    if found is None:
        storage.write(uri, decide().model_dump_json().encode(), if_absent=True)
        found = storage.read(uri)
    decision = Decision.model_validate_json(found)
    if decision.on != on:
        say("score", f"this pod has {on}, but {decision.on} scored before it: equal images may differ in the last bits")
    return decision
