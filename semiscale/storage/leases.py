"""Share work among pods by leases, without a coordinator.

A lease is a small object. It is created on the condition that it does not exist. Its holder renews it while its work
advances. A lease that was not renewed for LEASE_DURATION_S has expired. The pod that then creates the lease with the
next number holds the work. The work of a dead pod is free after LEASE_DURATION_S. The work of a pod that hangs is free
after STALL_TIMEOUT_S more. Leases only save work, because two pods that do the same work write the same bytes.
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

# A pod that does not renew its lease for this time counts as dead. Clocks may differ by half of it.
LEASE_DURATION_S = 120.0
RENEW_INTERVAL_S = LEASE_DURATION_S / 6
# Number of leases that are read at the same time, to hide the latency of an object store.
MAX_CONCURRENT_READS = 32
# A pod whose work has not advanced for this time counts as hung. Compiling a large network takes minutes, and so does
# one batch of the largest network on a slow core.
STALL_TIMEOUT_S = 600.0


class LeaseManager:
    """Holds the leases of one pod in one folder.

    Args:
        folder: Folder of the work that pods share. The leases are stored below `claims/`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._holder = uuid.uuid4().hex
        self._held: set[str] = set()
        # Guards the held leases, and keeps a lease from being deleted while it is renewed.
        self._lock = threading.Lock()
        self._renewing = False
        self._seen: dict[str, tuple[str, float]] = {}
        self.heartbeat()

    def heartbeat(self) -> None:
        """Record progress. Without it, leases are not renewed after STALL_TIMEOUT_S."""
        self._advanced = time.monotonic()

    @contextmanager
    def lease(self, work: str) -> Iterator[bool]:
        """Hold a lease inside the block.

        One thread renews all leases of this pod while the work advances. The lease is deleted at the end, so that the
        next pod does not wait.

        Args:
            work: Name of the work, which is a folder's name.

        Yields:
            False if another pod holds the lease.
        """
        uri = self._next(work)
        if uri is None:
            yield False
            return
        is_created = None
        try:
            is_created = self._create(uri)
            if is_created:
                self.heartbeat()
                self._hold(uri)
            yield is_created
        finally:
            with self._lock:
                self._held.discard(uri)
            # SIGTERM may interrupt the request that creates the lease after the store has accepted it.
            if is_created or (is_created is None and self._read(uri)[0] == self._holder):
                storage.delete(uri)

    def active(self) -> set[str]:
        """Return the names of the work that pods hold, this pod's included.

        A lease is read when it is first listed. A lease that changed since then was renewed for a full duration.

        Cost:
            One listing, which is a request for every thousand leases.
        """
        now = time.time()
        entries = list(storage.list_objects(storage.join(self._folder, "claims")))
        with ThreadPoolExecutor(MAX_CONCURRENT_READS) as pool:
            end_times = pool.map(lambda entry: self._end_time(entry, now), entries)
            self._seen = {entry.uri: (entry.version, end) for entry, end in zip(entries, end_times, strict=True)}
        return {uri.split("/")[-2] for uri, (_, end) in self._seen.items() if end > now}

    def _end_time(self, entry: storage.ObjectInfo, now: float) -> float:
        """Return the time at which a lease expires.

        It is at most LEASE_DURATION_S after `now`, even if the holder's clock is wrong.
        """
        version, end = self._seen.get(entry.uri, ("", 0.0))
        if not version:
            return min(self._read(entry.uri)[1], now + LEASE_DURATION_S)
        return end if version == entry.version else now + LEASE_DURATION_S

    def _next(self, work: str) -> str | None:
        """Return the URI of the lease to create, or None if a lease is valid."""
        folder = storage.join(self._folder, "claims", work)
        *_, latest = [None, *storage.list_objects(folder)]
        if latest and self._end_time(latest, time.time()) > time.time():
            return None
        number = int(latest.uri.rpartition("/")[2]) + 1 if latest else 0
        return storage.join(folder, f"{number:06}")

    def _create(self, uri: str) -> bool:
        """Create a lease, and return whether this process was the first."""
        content = self._content(time.time() + LEASE_DURATION_S)
        # If the response to a write is lost, the client writes again and then finds its own lease.
        return storage.write_bytes(uri, content, if_absent=True) or self._read(uri)[0] == self._holder

    @staticmethod
    def _read(uri: str) -> tuple[str, float]:
        """Return the holder of a lease and the time at which it expires.

        A deleted lease has no holder.
        """
        data = storage.read_or_none(uri)
        fields = json.loads(data or b'{"holder": "", "until": 0}')
        return fields["holder"], float(fields["until"])

    def _hold(self, uri: str) -> None:
        with self._lock:
            self._held.add(uri)
            if not self._renewing:
                self._renewing = True
                threading.Thread(target=self._renew, daemon=True, name="leases").start()

    def _renew(self) -> None:
        """Renew all held leases every RENEW_INTERVAL_S, until none is held."""
        while True:
            time.sleep(RENEW_INTERVAL_S)
            with self._lock:
                self._renewing = bool(held := list(self._held))
            if not held:
                return
            if time.monotonic() - self._advanced > STALL_TIMEOUT_S:
                continue
            for uri in held:
                # After a failed renewal, another pod may repeat the work. The work itself reports a failing store.
                with self._lock, suppress(OSError, SemiscaleError):
                    if uri in self._held:
                        self._write(uri, until=time.time() + LEASE_DURATION_S)

    def _write(self, uri: str, until: float) -> None:
        storage.write_bytes(uri, self._content(until))

    def _content(self, until: float) -> bytes:
        return json.dumps({"holder": self._holder, "until": until}).encode()
