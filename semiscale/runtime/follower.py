"""Stop the pods of a TrainJob or a Job when its run has ended.

A task of Kubeflow Pipelines creates the job and follows it. KFP can end this task without a signal, for example if the
run is cancelled or the task's time is over. The job would run on. The task therefore writes a heartbeat into the folder
of the work, and the pods read it. Of a training, rank 0 reads it. The command `cancel` leaves a mark in the run's
folder, which the pods read too.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from semiscale import storage
from semiscale.common.errors import AbandonedError, SemiscaleError
from semiscale.common.signals import TerminatedError
from semiscale.observability.progress import log_info
from semiscale.observability.task_status import cancellation_uri
from semiscale.receipts.plan import PlanReceipt
from semiscale.runtime.stage_config import StageConfig
from semiscale.storage.documents import load_document

# The environment variable tells a pod that a task follows its job.
FOLLOWED_ENV = "SEMISCALE_FOLLOWED"
HEARTBEAT_INTERVAL_S = 30.0
# Kubeflow starts a task that died again after 30 s, and its pod has to find a node.
FOLLOWER_TIMEOUT_S = 600.0


def heartbeat_uri(folder: str) -> str:
    """Return the URI of the heartbeat in the folder of a work."""
    return storage.join(folder, "follower.json")


@contextmanager
def send_heartbeats(folder: str, stage: str) -> Iterator[None]:
    """Write a heartbeat every HEARTBEAT_INTERVAL_S until the block ends.

    Args:
        folder: URI of the work's folder.
        stage: Name of the stage in log lines.

    Raises:
        SemiscaleError: The first heartbeat could not be written.
        OSError: The first heartbeat could not be written.
    """
    ended = threading.Event()

    def write() -> None:
        content = {"pod": socket.gethostname(), "at": time.time()}
        storage.write_bytes(heartbeat_uri(folder), json.dumps(content).encode())

    def repeat() -> None:
        while not ended.wait(HEARTBEAT_INTERVAL_S):
            # The pods wait much longer than one failed write.
            try:
                write()
            except (OSError, SemiscaleError) as error:
                log_info(stage, f"heartbeat for the pods failed: {error}")

    write()
    thread = threading.Thread(target=repeat, daemon=True, name="follower heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Abandonment:
    """The reason why nobody needs the work of this process any more.

    Attributes:
        reason: The reason, or "" as long as a task follows the job.
    """

    def __init__(self) -> None:
        self.reason = ""


@contextmanager
def stop_when_abandoned(folder: str, config: StageConfig, plan: str, kind: str) -> Iterator[Abandonment]:
    """Send SIGTERM to this process if its job is not followed, or its run was cancelled.

    The ranks of all nodes of a TrainJob then save a checkpoint and end. Nothing happens outside of a followed job.

    Args:
        folder: URI of the work's folder.
        config: Config of the stage.
        plan: URI of the plan's receipt, which names the run. It is read only in a followed job.
        kind: Kind of the job in log lines.

    Yields:
        The reason of the stop, once there is one.
    """
    abandonment = Abandonment()
    if FOLLOWED_ENV not in os.environ:
        yield abandonment
        return
    ended = threading.Event()
    run = load_document(plan, PlanReceipt).name
    uris = heartbeat_uri(folder), cancellation_uri(config.workdir, run)

    def watch() -> None:
        heartbeat, cancellation = _read_all(uris) or (None, None)
        changed_at = time.monotonic()
        while not ended.wait(HEARTBEAT_INTERVAL_S):
            contents = _read_all(uris)
            # While the store does not answer, nobody can write a heartbeat, and no work can be saved.
            if contents is None or contents[0] != heartbeat:
                changed_at = time.monotonic()
            reason = ""
            if contents and contents[1] != cancellation:
                reason = f"run {run} was cancelled"
            elif time.monotonic() - changed_at > FOLLOWER_TIMEOUT_S:
                reason = f"no task has followed this {kind} for {FOLLOWER_TIMEOUT_S:.0f} s"
            if reason:
                abandonment.reason = reason
                log_info(config.stage, f"{reason}: saving the work and stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            heartbeat = contents[0] if contents else heartbeat

    threading.Thread(target=watch, daemon=True, name="follower watch").start()
    try:
        yield abandonment
    finally:
        ended.set()


@contextmanager
def end_when_abandoned(folder: str, config: StageConfig, plan: str) -> Iterator[None]:
    """Stop the work of a Job's pod if its Job is not followed, or its run was cancelled.

    Args:
        folder: URI of the work's folder.
        config: Config of the stage.
        plan: URI of the plan's receipt.

    Raises:
        AbandonedError: The work was stopped. The Job does not replace a pod that ends with this error.
    """
    with stop_when_abandoned(folder, config, plan, "Job") as abandonment:
        try:
            yield
        except TerminatedError:
            if abandonment.reason:
                raise AbandonedError(
                    "SEMI-E006",
                    f"{config.stage}: {abandonment.reason}. Finished work is kept. Submit the run again to continue.",
                ) from None
            raise


def _read_all(uris: tuple[str, str]) -> tuple[bytes | None, bytes | None] | None:
    """Return the contents of both objects, or None if the store does not answer."""
    try:
        return storage.read_or_none(uris[0]), storage.read_or_none(uris[1])
    except (OSError, SemiscaleError):
        return None
