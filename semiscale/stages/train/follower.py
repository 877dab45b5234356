"""Stop the nodes of a TrainJob when its run has ended.

A task of Kubeflow Pipelines creates the TrainJob and follows it. KFP can end this task without a signal, for example if
the run is cancelled or the task's time is over. The TrainJob would train on. The task therefore writes a heartbeat
into the training's folder, and rank 0 of the nodes reads it. The command `cancel` leaves a mark in the run's folder,
which the nodes read too.
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
from semiscale.common.errors import SemiscaleError
from semiscale.observability.progress import log_info
from semiscale.observability.task_status import cancellation_uri

# The environment variable tells a node that a task follows its TrainJob.
FOLLOWED_ENV = "SEMISCALE_FOLLOWED"
HEARTBEAT_INTERVAL_S = 30.0
# Kubeflow starts a task that died again after 30 s, and its pod has to find a node.
FOLLOWER_TIMEOUT_S = 600.0


def heartbeat_uri(folder: str) -> str:
    """Return the URI of the heartbeat of a training's folder."""
    return storage.join(folder, "follower.json")


@contextmanager
def send_heartbeats(folder: str) -> Iterator[None]:
    """Write a heartbeat every HEARTBEAT_INTERVAL_S until the block ends.

    Args:
        folder: URI of the training's folder.

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
            # The nodes wait much longer than one failed write.
            try:
                write()
            except (OSError, SemiscaleError) as error:
                log_info("train", f"heartbeat for the nodes failed: {error}")

    write()
    thread = threading.Thread(target=repeat, daemon=True, name="follower heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def stop_when_abandoned(folder: str, workdir: str, run: str) -> Iterator[None]:
    """Send SIGTERM to this process if its TrainJob is not followed, or its run was cancelled.

    The ranks of all nodes then save a checkpoint and end. Nothing happens outside of a TrainJob.

    Args:
        folder: URI of the training's folder.
        workdir: URI of the workdir.
        run: Name of the run.
    """
    if FOLLOWED_ENV not in os.environ:
        yield
        return
    ended = threading.Event()
    uris = heartbeat_uri(folder), cancellation_uri(workdir, run)

    def watch() -> None:
        heartbeat, cancellation = _read_all(uris) or (None, None)
        changed_at = time.monotonic()
        while not ended.wait(HEARTBEAT_INTERVAL_S):
            contents = _read_all(uris)
            # While the store does not answer, nobody can write a heartbeat, and no checkpoint can be saved.
            if contents is None or contents[0] != heartbeat:
                changed_at = time.monotonic()
            reason = ""
            if contents and contents[1] != cancellation:
                reason = f"run {run} was cancelled"
            elif time.monotonic() - changed_at > FOLLOWER_TIMEOUT_S:
                reason = f"no task has followed this TrainJob for {FOLLOWER_TIMEOUT_S:.0f} s"
            if reason:
                log_info("train", f"{reason}: saving a checkpoint and stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            heartbeat = contents[0] if contents else heartbeat

    threading.Thread(target=watch, daemon=True, name="follower watch").start()
    try:
        yield
    finally:
        ended.set()


def _read_all(uris: tuple[str, str]) -> tuple[bytes | None, bytes | None] | None:
    """Return the contents of both objects, or None if the store does not answer."""
    try:
        return storage.read_or_none(uris[0]), storage.read_or_none(uris[1])
    except (OSError, SemiscaleError):
        return None
