"""Share a list of work items among pods by leases, without a coordinator.

Pods may join and die at any time. A lease only saves work. Two pods that process the same item write the same bytes.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Generic, TypeVar

from semiscale.common.errors import SemiscaleError
from semiscale.observability.progress import log_info
from semiscale.storage.leases import LEASE_DURATION_S, LeaseManager

# A pod with this environment variable takes no work. It waits until other pods have done all of it
# (semiscale/runtime/supervisor.py).
OBSERVER_ENV = "SEMISCALE_OBSERVER"

Item = TypeVar("Item")

# An idle pod checks this often whether the pods that hold the remaining items are alive.
POLL_INTERVAL_S = 2.0
# An observer gives up when no pod has held a lease for this long. The work of a dead pod is free after one lease.
OBSERVER_TIMEOUT_S = 3 * LEASE_DURATION_S


def rotate_to_start(items: Sequence[Item], pod: int, pods: int) -> list[Item]:
    """Rotate a list so that each pod begins at its own item.

    Args:
        items: All work items, in the same order on every pod.
        pod: Number of this pod, from 0.
        pods: Number of pods.

    Returns:
        All items, beginning with the first one of this pod's equal part.
    """
    start = pod * len(items) // pods
    return [*items[start:], *items[:start]]


def _is_observer() -> bool:
    return OBSERVER_ENV in os.environ


class SharedWork(Generic[Item]):
    """Processes work items that no other pod holds, until all items are done.

    Args:
        leases: Leases of the folder that the items are written to.
        stage: Name of the stage in log lines.
        noun: Plural noun of the items in log lines.
        lease_name: Returns the name of an item's lease.
        list_unfinished: Returns the items that are not done, in the same order. It runs once after every round.
        is_done: Checks an item before a lease is asked for.
        is_done_under_lease: Checks an item after its lease was obtained. The previous holder may have finished it.
        items_per_round: Number of leased items after which the unfinished items are listed again. 0 means no limit.

    Cost:
        One listing of all leases per round. Each item adds the requests of one lease and of the two checks.
    """

    def __init__(
        self,
        leases: LeaseManager,
        stage: str,
        noun: str,
        lease_name: Callable[[Item], str],
        list_unfinished: Callable[[list[Item]], list[Item]],
        is_done: Callable[[Item], bool] = lambda _: False,
        is_done_under_lease: Callable[[Item], bool] = lambda _: False,
        items_per_round: int = 0,
    ) -> None:
        self._leases, self._stage, self._noun, self._lease_name = leases, stage, noun, lease_name
        self._list_unfinished, self._items_per_round = list_unfinished, items_per_round
        self._is_done, self._is_done_under_lease = is_done, is_done_under_lease
        self._held: dict[str, ExitStack] = {}
        self._num_leased = 0
        self._seen_done: set[str] = set()
        self._others_worked_at = 0.0

    def run(self, items: list[Item], process: Callable[[Iterator[Item]], None]) -> None:
        """Process items in rounds until all of them are done by any pod.

        Items that other pods hold are waited for. If one of these pods dies, its lease expires and the next round
        takes the item over.

        Args:
            items: The unfinished items, beginning with this pod's first one.
            process: Processes one round. Each item that the iterator yields is leased. `process` calls `release` when
                the item is committed. Leases that are left at its end or at an error are released here.

        Raises:
            SemiscaleError: This pod is an observer, and no other pod works.
        """
        self._others_worked_at = time.monotonic()
        num_logged = 0
        remaining = items
        while remaining:
            self._num_leased = 0
            self._seen_done.clear()
            try:
                process(self._lease_available(remaining))
            finally:
                for lease in self._held.values():
                    lease.close()
                self._held.clear()

            # Sleep only if this round found no free item, and other pods still hold some.
            waiting = [item for item in remaining if self._lease_name(item) not in self._seen_done]
            if waiting and not self._num_leased:
                self._check_others_work(len(waiting))
                if num_logged != len(waiting):
                    num_logged = len(waiting)
                    log_info(self._stage, f"{self._noun} that other pods hold: {num_logged} of {len(items)}")
                time.sleep(POLL_INTERVAL_S)
            remaining = self._list_unfinished(waiting) if waiting else []

    def run_each(self, items: list[Item], process: Callable[[Item], None]) -> None:
        """Process items one after the other until all of them are done by any pod.

        Args:
            items: The unfinished items, beginning with this pod's first one.
            process: Processes and commits one leased item.
        """

        def process_round(leased: Iterator[Item]) -> None:
            for item in leased:
                process(item)
                self.release(item)

        self.run(items, process_round)

    def release(self, item: Item) -> None:
        """Release the lease of an item that is committed. Any thread may call this."""
        self._held.pop(self._lease_name(item)).close()

    def _check_others_work(self, num_waiting: int) -> None:
        """Raise an error if this pod is an observer, and no other pod has held a lease for OBSERVER_TIMEOUT_S."""
        if _is_observer() and time.monotonic() - self._others_worked_at > OBSERVER_TIMEOUT_S:
            raise SemiscaleError(
                "SEMI-E005",
                f"{self._stage}: no pod works on the last {num_waiting} {self._noun}, and this pod cannot. "
                "See the first failure in its log, then submit the run again.",
            )

    def _lease_available(self, items: Sequence[Item]) -> Iterator[Item]:
        """Yield items one by one, each leased when it is asked for."""
        # One listing skips everything that other pods hold. An item that was finished since then has no lease any more.
        held_by_others = self._leases.active()
        if held_by_others:
            self._others_worked_at = time.monotonic()
        for item in items:
            name = self._lease_name(item)
            if name in held_by_others:
                continue
            if self._is_done(item):
                self._seen_done.add(name)
                continue
            if _is_observer():
                return
            lease = ExitStack()
            if not lease.enter_context(self._leases.lease(name)):
                lease.close()
                continue
            self._num_leased += 1
            if self._is_done_under_lease(item):
                self._seen_done.add(name)
                lease.close()
            else:
                self._held[name] = lease
                yield item
            if self._num_leased == self._items_per_round:
                return


__all__ = ["POLL_INTERVAL_S", "SharedWork", "rotate_to_start"]
