"""Choose how many pods the remaining work can keep busy.

A pod without work still costs minutes of a node, so a round without new work starts one pod. The number changes no
result, because pods share their work by leases. It is never 0, because an empty loop fails in Kubeflow.
"""

import os
import time
from collections.abc import Callable

from semiscale.common.digest import content_digest
from semiscale.config.resources import FAN_OUT_ENV, MAX_LOOP_PODS
from semiscale.observability.progress import log_info
from semiscale.receipts.fanout import FanoutReceipt
from semiscale.runtime.stage_config import StageConfig


def choose_pod_count(
    config: StageConfig, max_pods: int, folder: str, count_remaining: Callable[[], tuple[int, str]]
) -> FanoutReceipt:
    """Choose the number of pods for the remaining work in a folder, and log it.

    The work is counted on every call, because each attempt leaves less of it.

    Args:
        config: Config of the stage.
        max_pods: Largest number of pods.
        folder: URI of the work's folder.
        count_remaining: Returns the number of pieces that different pods can process at the same time, and a text that
            describes them.

    Returns:
        The receipt with the number of pods, and with the reason for it.
    """
    started = time.monotonic()
    pieces, description = count_remaining()
    is_loop = os.environ.get(FAN_OUT_ENV) == "loop"
    limit = min(max_pods, MAX_LOOP_PODS) if is_loop else max_pods
    pods = max(min(limit, pieces), 1)
    why = f"{pods:,} of {max_pods:,} pods: {description}"
    if limit < min(max_pods, pieces):
        why += (
            f". This pipeline was compiled for loops, which have at most {MAX_LOOP_PODS} pods. Compile it for a run "
            "file with more pods, or with hardware.scan.fan_out: job"
        )
    log_info(config.stage, why)
    return FanoutReceipt(
        stage=config.stage,
        digest=content_digest(folder, pods),
        folder=folder,
        seconds=round(time.monotonic() - started, 3),
        pods=pods,
        why=why,
    )


def loop_items(receipt: FanoutReceipt) -> list[int]:
    """Return the items of the pipeline's loop: the numbers of the pods, or one item that follows a Job.

    Args:
        receipt: The number of pods that the remaining work needs.
    """
    return [0] if os.environ.get(FAN_OUT_ENV) == "job" else list(range(receipt.pods))
