"""Run a stage's work once, and load its receipt if it has finished before."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from semiscale import storage
from semiscale.observability.progress import format_duration, log_info
from semiscale.receipts.base import Receipt
from semiscale.runtime.stage_config import StageConfig

R = TypeVar("R", bound=Receipt)


def run_once(
    config: StageConfig,
    kind: type[R],
    work: Callable[[str], Mapping[str, Any]],
    folder: str | None = None,
    writes: bool = True,
) -> R:
    """Do a stage's work in its own folder, or find it done.

    `work(folder)` returns the fields of the receipt beyond the common ones, and may replace those. The receipt is
    written last, so a folder that has one is whole. Of several processes that work together, one `writes`.
    """
    folder = folder or config.folder()
    uri = storage.join(folder, "receipt.json")
    found = storage.read_or_none(uri)
    if found is not None:
        log_info(config.stage, f"finished before: {folder}")
        return kind.model_validate_json(found)
    started = time.monotonic()
    fields = work(folder)
    seconds = round(time.monotonic() - started, 3)
    common = {"stage": config.stage, "digest": config.digest(), "folder": folder, "seconds": seconds}
    receipt = kind.model_validate({**common, **fields})
    if writes and not storage.write_bytes(uri, receipt.model_dump_json(indent=1).encode(), if_absent=True):
        # Another process that did the same work was first; its receipt may have been read already.
        return kind.model_validate_json(storage.read_bytes(uri))
    log_info(config.stage, f"finished in {format_duration(seconds)}")
    return receipt
