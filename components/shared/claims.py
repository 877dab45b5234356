"""Claims: how any number of pods, joining and dying at any time, share the work without a coordinator.

A claim is a small object, created on the condition that there is none. Its holder renews it while it works; one that
has not been renewed for LEASE_S is void, and whoever creates the next number holds the work. A claim only saves work:
two pods that do it at once leave the same bytes.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from components.shared import storage
from components.shared.errors import SemiscaleError

LEASE_S = 120.0  # a pod that has been silent for so long is taken for dead; clocks may differ by half of it
RENEW_EVERY_S = LEASE_S / 6


class Claims:
    """One pod's claims on the shards and units of one folder of scores."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._holder = uuid.uuid4().hex

    @contextmanager
    def claimed(self, work: str) -> Iterator[bool]:
        """Hold a shard or a unit for the length of a `with`; yields False where another pod holds it.

        The claim is renewed by a thread, and given back at the end, so that the next pod need not wait.
        """
        uri = self._claim(work)
        if uri is None:
            yield False
            return
        over = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(uri, over), daemon=True)
        renewing.start()
        try:
            yield True
        finally:
            over.set()
            renewing.join()
            storage.delete(uri)

    def _claim(self, work: str) -> str | None:
        """Create the next claim after those that are void; whoever creates it first has it."""
        folder = storage.join(self._folder, "claims", work)
        numbers = [int(entry.uri.rpartition("/")[2]) for entry in storage.entries(folder)]
        latest = max(numbers, default=-1)
        if latest >= 0 and self._holds(storage.join(folder, f"{latest:06}")):
            return None
        uri = storage.join(folder, f"{latest + 1:06}")
        claim = self._content(time.time() + LEASE_S)
        return uri if storage.write(uri, claim, if_absent=True) else None

    @staticmethod
    def _holds(uri: str) -> bool:
        data = storage.read_if_there(uri)
        return data is not None and float(json.loads(data)["until"]) > time.time()

    def _renew(self, uri: str, over: threading.Event) -> None:
        while not over.wait(RENEW_EVERY_S):
            # A claim that is not renewed costs another pod's work at most; what fails the work itself will say so.
            with suppress(OSError, SemiscaleError):
                self._write(uri, until=time.time() + LEASE_S)

    def _write(self, uri: str, until: float) -> None:
        storage.write(uri, self._content(until))

    def _content(self, until: float) -> bytes:
        return json.dumps({"holder": self._holder, "until": until}).encode()
