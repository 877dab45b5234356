"""Test that pods share work items by leases, also if a pod dies or fails."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.runtime import shared_work
from semiscale.runtime.shared_work import SharedWork, rotate_to_start
from semiscale.storage import leases
from semiscale.storage.leases import LeaseManager

ITEMS = [f"item-{number}" for number in range(12)]
# A test that waits longer has a deadlock.
TIMEOUT_S = 4.0


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let idle pods look for free items often, because items take milliseconds."""
    monkeypatch.setattr(shared_work, "POLL_INTERVAL_S", 0.02)


class Pod:
    """A pod that shares the items of a folder with other pods.

    Args:
        folder: Folder of leases and results.
        items_per_round: Number of items of one round. 0 means no limit.
    """

    def __init__(self, folder: Path, items_per_round: int = 0) -> None:
        self._folder = folder
        self.processed: list[str] = []
        self.work = SharedWork[str](
            LeaseManager(str(folder)),
            "test",
            "items",
            lease_name=lambda item: item,
            list_unfinished=lambda items: [item for item in items if not self.is_done(item)],
            is_done=self.is_done,
            is_done_under_lease=self.is_done,
            items_per_round=items_per_round,
        )

    def is_done(self, item: str) -> bool:
        """Return whether any pod has written the result of an item."""
        return (self._folder / f"{item}.done").exists()

    def process(self, item: str) -> None:
        """Record an item, and write its result."""
        self.processed.append(item)
        (self._folder / f"{item}.done").touch()


def held_leases(folder: Path) -> list[Path]:
    """Return the files of all leases in a folder."""
    return list(folder.glob("claims/*/*"))


def write_lease(folder: Path, item: str, until: float) -> None:
    """Write the lease of a pod that does not renew it.

    Args:
        folder: Folder of the leases.
        item: Name of the item.
        until: Time at which the lease ends.
    """
    content = json.dumps({"holder": "dead", "until": until}).encode()
    assert storage.write_bytes(storage.join(str(folder), "claims", item, "000000"), content, if_absent=True)


@pytest.mark.parametrize("items_per_round", [0, 2])
def test_two_pods_process_every_item_once(tmp_path: Path, items_per_round: int) -> None:
    pods = [Pod(tmp_path, items_per_round), Pod(tmp_path, items_per_round)]
    # Both pods hold their first item at the same time, so neither can process everything alone.
    both_hold_an_item = threading.Barrier(2)

    def run(number: int) -> None:
        pod = pods[number]

        def process(item: str) -> None:
            if not pod.processed:
                both_hold_an_item.wait(TIMEOUT_S)
            pod.process(item)
            time.sleep(0.002)

        pod.work.run_each(rotate_to_start(ITEMS, number, 2), process)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2)))
    assert all(pod.processed for pod in pods)
    assert sorted(pods[0].processed + pods[1].processed) == sorted(ITEMS)
    assert not held_leases(tmp_path)


def test_an_item_of_another_pod_is_waited_for_and_not_processed_again(tmp_path: Path) -> None:
    holder, waiting = Pod(tmp_path), Pod(tmp_path)
    holds_item, may_finish = threading.Event(), threading.Event()

    def process_slowly(item: str) -> None:
        holds_item.set()
        assert may_finish.wait(TIMEOUT_S)
        holder.process(item)

    with ThreadPoolExecutor(2) as threads:
        holding = []

        def process(item: str) -> None:
            if item == "free":
                # The other pod gets its lease after this pod has listed the leases.
                holding.append(threads.submit(holder.work.run_each, ["slow"], process_slowly))
                assert holds_item.wait(TIMEOUT_S)
            waiting.process(item)

        run = threads.submit(waiting.work.run_each, ["free", "slow"], process)
        assert holds_item.wait(TIMEOUT_S)
        time.sleep(0.1)
        assert not run.done(), "the pod waits for the item that the other pod holds"
        may_finish.set()
        run.result(TIMEOUT_S)
        holding[0].result(TIMEOUT_S)
    assert (holder.processed, waiting.processed) == (["slow"], ["free"])


def test_a_pod_holds_only_the_leases_of_items_that_are_not_committed(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    num_held: list[int] = []

    def process(item: str) -> None:
        num_held.append(len(held_leases(tmp_path)))
        pod.process(item)

    pod.work.run_each(ITEMS[:4], process)
    assert num_held == [1] * 4


def test_the_item_of_a_dead_pod_is_processed_after_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_DURATION_S", 1.0)
    expires_at = time.time() + leases.LEASE_DURATION_S
    write_lease(tmp_path, "item-0", expires_at)
    pod = Pod(tmp_path)
    finished_at: dict[str, float] = {}

    def process(item: str) -> None:
        pod.process(item)
        finished_at[item] = time.time()

    pod.work.run_each(ITEMS[:3], process)
    assert pod.processed == ["item-1", "item-2", "item-0"]
    assert finished_at["item-2"] < expires_at <= finished_at["item-0"]


def test_items_that_are_done_are_not_processed(tmp_path: Path) -> None:
    earlier, later = Pod(tmp_path), Pod(tmp_path)
    earlier.work.run_each(ITEMS[:3], earlier.process)
    later.work.run_each(ITEMS[:5], later.process)
    assert later.processed == ITEMS[3:5]


def test_an_item_that_the_previous_holder_finished_is_not_processed(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    # The previous holder finishes after the first check and releases its lease before this pod gets it.
    checked: list[str] = []

    def is_done_before_lease(item: str) -> bool:
        checked.append(item)
        is_done = pod.is_done(item)
        (tmp_path / f"{item}.done").touch()
        return is_done

    work = SharedWork[str](
        LeaseManager(str(tmp_path)),
        "test",
        "items",
        lease_name=lambda item: item,
        list_unfinished=lambda items: [item for item in items if not pod.is_done(item)],
        is_done=is_done_before_lease,
        is_done_under_lease=pod.is_done,
    )
    work.run_each(["item-0"], pod.process)
    assert checked == ["item-0"]
    assert not pod.processed
    assert not held_leases(tmp_path)


def test_leases_are_released_on_an_error(tmp_path: Path) -> None:
    failing, other = Pod(tmp_path), Pod(tmp_path)
    num_held: list[int] = []

    def fail_with_three_leases(leased: Iterator[str]) -> None:
        assert [next(leased) for _ in range(3)] == ITEMS[:3]
        num_held.append(len(held_leases(tmp_path)))
        raise SemiscaleError("SEMI-E001", "disk: It is full. Free some space.")

    with pytest.raises(SemiscaleError, match=r"SEMI-E001"):
        failing.work.run(list(ITEMS), fail_with_three_leases)
    assert num_held == [3]
    assert not held_leases(tmp_path)

    # The next pod does not wait for a lease to expire.
    started = time.monotonic()
    other.work.run_each(list(ITEMS), other.process)
    assert other.processed == ITEMS
    assert time.monotonic() - started < TIMEOUT_S < leases.LEASE_DURATION_S


def test_each_pod_begins_at_a_different_item() -> None:
    assert rotate_to_start(ITEMS, 0, 3) == ITEMS
    assert rotate_to_start(ITEMS, 2, 3) == [*ITEMS[8:], *ITEMS[:8]]
    assert [rotate_to_start(["only"], pod, 3) for pod in range(3)] == [["only"]] * 3
    assert rotate_to_start([], 1, 2) == []


def test_an_observer_waits_until_other_pods_have_done_all_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, observer = Pod(tmp_path), Pod(tmp_path)
    monkeypatch.setenv(shared_work.OBSERVER_ENV, "1")
    with ThreadPoolExecutor(1) as pool:
        observed = pool.submit(observer.work.run_each, ITEMS, observer.process)
        time.sleep(0.1)
        assert not observed.done()
        for item in ITEMS:
            worker.process(item)
        observed.result(TIMEOUT_S)
    assert observer.processed == []


def test_an_observer_fails_if_no_pod_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Pod(tmp_path)
    monkeypatch.setenv(shared_work.OBSERVER_ENV, "1")
    monkeypatch.setattr(shared_work, "OBSERVER_TIMEOUT_S", 0.3)
    # The lease of a pod that has just died.
    write_lease(tmp_path, ITEMS[0], time.time() + 0.5)
    started = time.monotonic()
    with pytest.raises(SemiscaleError, match="SEMI-E005"):
        observer.work.run_each(ITEMS, observer.process)
    assert time.monotonic() - started > 0.5
    assert observer.processed == []
