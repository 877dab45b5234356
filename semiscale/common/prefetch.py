"""Prefetch results in daemon threads, to hide the latency of a store.

The threads are daemons, so a store that does not answer does not delay the end of the process.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from queue import SimpleQueue
from threading import Semaphore
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Task = Callable[[], None]


def run_in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Start work in a new thread, and return its future."""
    future: Future[Result] = Future()
    threading.Thread(target=_complete, args=(work, future), daemon=True, name="prefetch").start()
    return future


def map_prefetched(work: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Generator[Result]:
    """Yield `work(item)` of every item in order, while threads compute the next ones.

    An error of `work` is raised instead of its result.

    Args:
        work: Function that is called in a thread.
        items: Items. Each is read when a thread can work on it.
        at_once: Number of results in progress, and of threads.

    Yields:
        The results, in the order of the items.

    Cost:
        Memory for `at_once` results. The threads end after the last item, or when this iterator is closed.
    """
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    pending: deque[Future[Result]] = deque()
    threads = 0
    try:
        for item in items:
            pending.append(_submit(tasks, work, item))
            if threads < at_once:
                threading.Thread(target=_worker, args=(tasks,), daemon=True, name="prefetch").start()
                threads += 1
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for _ in range(threads):
            tasks.put(None)


def prefetch(
    items: Generator[Item],
    at_once: int = 1,
    *,
    discard: Callable[[Item], None] | None = None,
    join_timeout_s: float = 0.0,
) -> Generator[Item]:
    """Yield the items of a generator, while a thread produces the next ones.

    An error of the generator is raised instead of its item. When this iterator is closed, the generator is closed
    after the item that it is producing.

    Args:
        items: The generator.
        at_once: Number of items that are ready or being produced, besides the one in use.
        discard: Function that gets each item that is produced and not used, when this iterator is closed.
        join_timeout_s: Seconds to wait for the thread when this iterator is closed.

    Yields:
        The items in order.

    Cost:
        Memory for `at_once` items and the one in use.
    """
    ready: SimpleQueue[Future[Item]] = SimpleQueue()
    permits = Semaphore(at_once)
    stop = threading.Event()

    def produce_items() -> None:
        with closing(items):
            while permits.acquire() and not stop.is_set():
                item: Future[Item] = Future()
                _complete(lambda: next(items), item)
                ready.put(item)
                if item.exception():
                    return

    def discard_ready() -> None:
        while discard and not ready.empty():
            item = ready.get()
            if not item.exception():
                discard(item.result())

    thread = threading.Thread(target=produce_items, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item.exception(), StopIteration):
                return
            permits.release()
            yield item.result()
    finally:
        stop.set()
        # The thread may wait for its permit, or in the generator for something that `discard` frees.
        permits.release()
        deadline = time.monotonic() + join_timeout_s
        while thread.is_alive() and time.monotonic() < deadline:
            discard_ready()
            thread.join(0.01)
        discard_ready()


def _submit(tasks: "SimpleQueue[Task | None]", work: Callable[[Item], Result], item: Item) -> Future[Result]:
    future: Future[Result] = Future()
    tasks.put(lambda: _complete(lambda: work(item), future))
    return future


def _worker(tasks: "SimpleQueue[Task | None]") -> None:
    while task := tasks.get():
        task()


def _complete(work: Callable[[], Result], future: Future[Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    # `result` raises the error in the thread that waits for it.
    except BaseException as error:  # noqa: BLE001
        future.set_exception(error)
