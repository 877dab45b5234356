"""Run a stage's work once, and load its receipt if it has finished earlier."""

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
    """Run a stage's work in its own folder, unless the folder has a receipt.

    The receipt is written last, so a folder with a receipt is complete.

    Args:
        config: Config of the stage.
        kind: Class of the receipt.
        work: Function that gets the folder. It returns the fields of the receipt, and may replace common fields.
        folder: URI of the folder. By default it is the config's folder.
        writes: Whether this process writes the receipt. Several processes that share the work have one that does.

    Returns:
        The receipt of the first process that finished the work.
    """
    folder = folder or config.folder()
    uri = storage.join(folder, "receipt.json")
    stored = storage.read_or_none(uri)
    if stored is not None:
        log_info(config.stage, f"finished before: {folder}")
        return kind.model_validate_json(stored)
    started = time.monotonic()
    fields = work(folder)
    seconds = round(time.monotonic() - started, 3)
    common = {"stage": config.stage, "digest": config.digest(), "folder": folder, "seconds": seconds}
    receipt = kind.model_validate({**common, **fields})
    if writes and not storage.write_bytes(uri, receipt.model_dump_json(indent=1).encode(), if_absent=True):
        # Another process finished the same work first. Later stages may have read its receipt already, so it stays.
        return kind.model_validate_json(storage.read_bytes(uri))
    log_info(config.stage, f"finished in {format_duration(seconds)}")
    return receipt
