"""Work done ahead by threads: hides a store's latency from whoever reads one thing after the other.

The threads are daemons: a store that does not answer holds up no process that is told to stop.
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
    """Begin work in a thread of its own."""
    future: Future[Result] = Future()
    threading.Thread(target=_complete, args=(work, future), daemon=True, name="ahead").start()
    return future


def map_prefetched(work: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Generator[Result]:
    """Yield `work(item)` of every item, in order, `at_once` of them under way. Raises what `work` raises, in its place.

    Memory: `at_once` results. Threads: as many, until the last item or until this iterator is closed.
    """
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    under_way: deque[Future[Result]] = deque()
    threads = 0
    try:
        for item in items:
            under_way.append(_submit(tasks, work, item))
            if threads < at_once:
                threading.Thread(target=_worker, args=(tasks,), daemon=True, name="ahead").start()
                threads += 1
            if len(under_way) == at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
        for _ in range(threads):
            tasks.put(None)


def prefetch_one(items: Generator[Item]) -> Generator[Item]:
    """Yield what a generator makes; while one item is worked on, a thread of its own makes the next.

    Raises what making one raises, in its place. Memory: the item that is worked on, one that is ready, and the one that
    is being made. When this iterator is closed, the generator is closed too, as soon as it has made an item.
    """
    ready: Queue[Future[Item] | None] = Queue(1)
    stop = threading.Event()

    def make() -> None:
        with closing(items):
            while not stop.is_set():
                made: Future[Item] = Future()
                _complete(lambda: next(items), made)
                ready.put(None if isinstance(made.exception(), StopIteration) else made)
                if made.exception():
                    return

    threading.Thread(target=make, daemon=True, name="ahead").start()
    try:
        while made := ready.get():
            yield made.result()
    finally:
        stop.set()
        while not ready.empty():  # it may be waiting for a place
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
    except BaseException as error:  # noqa: BLE001 - handed to the thread that asks for the result, which raises it
        future.set_exception(error)
