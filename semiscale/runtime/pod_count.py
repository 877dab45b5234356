"""Choose how many pods the remaining work keeps busy.

A pod without work still costs minutes of a node, so a round without new work starts one pod. The number changes no
result, because pods share their work by leases. It is never 0, because a loop over nothing fails in Kubeflow.
"""

import time
from collections.abc import Callable

from semiscale.common.digest import content_digest
from semiscale.observability.progress import log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.runtime.stage_config import StageConfig


def choose_pod_count(config: StageConfig, most: int, folder: str, left: Callable[[], tuple[int, str]]) -> FanoutReceipt:
    """Return, and say, how many of at most so many pods the work in a folder is worth.

    `left` counts the pieces that different pods can do at the same time, and says what they are. It is asked every
    time: what is left is another number after each try.
    """
    started = time.monotonic()
    pieces, what = left()
    pods = max(min(most, pieces), 1)
    why = f"{pods:,} of {most:,} pods: {what}"
    log_info(config.stage, why)
    return FanoutReceipt(
        stage=config.stage,
        digest=content_digest(folder, pods),
        folder=folder,
        seconds=round(time.monotonic() - started, 3),
        pods=pods,
        why=why,
    )
