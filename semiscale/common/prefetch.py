"""Prefetch results in daemon threads, to hide the latency of a store.

The threads are daemons, so a store that does not answer does not delay the end of the process.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from queue import Queue, SimpleQueue
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


def prefetch_one(items: Generator[Item]) -> Generator[Item]:
    """Yield the items of a generator, while a thread produces the next one.

    An error of the generator is raised instead of its item. When this iterator is closed, the generator is closed
    after the item that it is producing.

    Cost:
        Memory for three items. One is in use, one is ready, and one is being produced.
    """
    ready: Queue[Future[Item] | None] = Queue(1)
    stop = threading.Event()

    def produce_items() -> None:
        with closing(items):
            while not stop.is_set():
                item: Future[Item] = Future()
                _complete(lambda: next(items), item)
                ready.put(None if isinstance(item.exception(), StopIteration) else item)
                if item.exception():
                    return

    threading.Thread(target=produce_items, daemon=True, name="prefetch").start()
    try:
        while item := ready.get():
            yield item.result()
    finally:
        stop.set()
        # The thread may be blocked by a full queue.
        while not ready.empty():
            ready.get_nowait()


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
