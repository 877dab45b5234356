"""Claims: how any number of pods, joining and dying at any time, share the work without a coordinator.

A claim is a small object, created on the condition that there is none. Its holder renews it while its work advances;
one that has not been renewed for LEASE_S is void, and whoever creates the next number holds the work. So a pod that is
dead loses its work after LEASE_S, one that hangs, in a read or on its device, after STALLED_S more. A claim only saves
work: two pods that do it at once, because one of them was slow or woke up again, leave the same bytes.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from semiscale import storage
from semiscale.common.errors import SemiscaleError

LEASE_DURATION_S = 120.0  # a pod that has been silent for so long is taken for dead; clocks may differ by half of it
RENEW_INTERVAL_S = LEASE_DURATION_S / 6
MAX_CONCURRENT_READS = 32  # claims read at once: hides an object store's latency
# A pod whose work has not advanced for so long is taken for hung. Compiling a large network takes minutes, and so does
# one batch of the largest on a slow core.
STALL_TIMEOUT_S = 600.0


class LeaseManager:
    """One pod's claims on the shards and units of one folder of scores."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._holder = uuid.uuid4().hex
        self._held: set[str] = set()
        self._lock = threading.Lock()  # of what is held, and while a claim is renewed: it is not given back meanwhile
        self._renewing = False
        self._seen: dict[str, tuple[str, float]] = {}
        self.heartbeat()

    def heartbeat(self) -> None:
        """Say that the work this pod holds goes on: without, its claims are renewed no longer than STALLED_S."""
        self._advanced = time.monotonic()

    @contextmanager
    def lease(self, work: str) -> Iterator[bool]:
        """Hold a shard or a unit for the length of a `with`; yields False where another pod holds it.

        The claim is renewed, while the work advances, by the thread of all this pod's claims, and given back at the
        end, so that the next pod need not wait.
        """
        uri = self._next(work)
        if uri is None:
            yield False
            return
        mine = None
        try:
            mine = self._create(uri)
            if mine:
                self.heartbeat()
                self._hold(uri)
            yield mine
        finally:
            with self._lock:
                self._held.discard(uri)
            # SIGTERM may interrupt the request that creates the claim, after the store has taken it.
            if mine or (mine is None and self._read(uri)[0] == self._holder):
                storage.delete(uri)

    def active(self) -> set[str]:
        """Return the work that any pod holds: one listing, which is a request for every thousand claims.

        A claim is read when it is first seen; one that has changed since was renewed, and holds for as long again.
        """
        now = time.time()
        found = list(storage.list_objects(storage.join(self._folder, "claims")))
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            untils = pool.map(lambda entry: self._holds_until(entry, now), found)
            self._seen = {entry.uri: (entry.version, until) for entry, until in zip(found, untils, strict=True)}
        return {uri.split("/")[-2] for uri, (_, until) in self._seen.items() if until > now}

    def _holds_until(self, entry: storage.ObjectInfo, now: float) -> float:
        """Return until when a claim holds: no longer than a lease from now, whatever its holder's clock said."""
        version, until = self._seen.get(entry.uri, ("", 0.0))
        if not version:
            return min(self._read(entry.uri)[1], now + LEASE_DURATION_S)
        return until if version == entry.version else now + LEASE_DURATION_S

    def _next(self, work: str) -> str | None:
        """Return the URI of the next claim after those that are void; None where a claim is valid."""
        folder = storage.join(self._folder, "claims", work)
        *_, latest = [None, *storage.list_objects(folder)]
        if latest and self._holds_until(latest, time.time()) > time.time():
            return None
        number = int(latest.uri.rpartition("/")[2]) + 1 if latest else 0
        return storage.join(folder, f"{number:06}")

    def _create(self, uri: str) -> bool:
        """Create a claim; whoever creates it first has it."""
        claim = self._content(time.time() + LEASE_DURATION_S)
        # If the answer to a write is lost, the client writes again and is told that there is a claim: this one.
        return storage.write_bytes(uri, claim, if_absent=True) or self._read(uri)[0] == self._holder

    def _claim(self, work: str) -> str | None:
        """Return the URI of a new claim; None where another process has the work."""
        uri = self._next(work)
        return uri if uri and self._create(uri) else None

    @staticmethod
    def _read(uri: str) -> tuple[str, float]:
        """Return who holds a claim and until when; nobody where it was given back."""
        data = storage.read_or_none(uri)
        claim = json.loads(data or b'{"holder": "", "until": 0}')
        return claim["holder"], float(claim["until"])

    def _hold(self, uri: str) -> None:
        with self._lock:
            self._held.add(uri)
            if not self._renewing:
                self._renewing = True
                threading.Thread(target=self._renew, daemon=True, name="claims").start()

    def _renew(self) -> None:
        """Renew what is held, one claim after the other, until nothing is."""
        while True:
            time.sleep(RENEW_INTERVAL_S)
            with self._lock:
                self._renewing = bool(held := list(self._held))
            if not held:
                return
            if time.monotonic() - self._advanced > STALL_TIMEOUT_S:
                continue
            for uri in held:
                # A claim that is not renewed costs another pod's work at most; what fails the work itself will say so.
                with self._lock, suppress(OSError, SemiscaleError):
                    if uri in self._held:
                        self._write(uri, until=time.time() + LEASE_DURATION_S)

    def _write(self, uri: str, until: float) -> None:
        storage.write_bytes(uri, self._content(until))

    def _content(self, until: float) -> bytes:
        return json.dumps({"holder": self._holder, "until": until}).encode()
