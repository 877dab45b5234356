"""The feed in processes of its own: what a GPU needs.

Each process reads and decodes whole shards, with a few cores, into memory that this process has too. This one hands out
the shards and takes the batches, so that little holds up the thread that launches the GPU's work.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import Any

from semiscale.common.cpu import available_cpus
from semiscale.common.worker_process import Channel, SharedBatchBuffer, WorkerProcess, start_receiver
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, Shard
from semiscale.stages.score.shard_loader import (
    SHUTDOWN_TIMEOUT_S,
    DecodedBatch,
    SampleInfo,
    ShardLoader,
    ShardSpan,
    buffer_shape,
)

CPUS_PER_PROCESS = 4  # so few threads hardly wait for each other's turn in the interpreter
_WANTED = "wanted"  # what a process sends when it is ready for a shard


@dataclass(frozen=True)
class _LoaderProcess:
    """One feed's process, the first of its slots, and the shards that it was given and has not ended."""

    beside: WorkerProcess
    first: int
    shards: deque[Shard] = field(default_factory=deque)


class ProcessShardLoader:
    """Decodes for one scan, as Feed does, in a process for every CORES_EACH cores.

    Memory of each: the slots of a feed, 0.23 GB of images at 224 pixels, and 0.5 GB for libraries and encoded images.
    They begin before there is a shard, because importing takes seconds.
    """

    def __init__(self, preprocessing: Preprocessing, columns: SampleFields, batch_size: int, in_use: int) -> None:
        self._preprocessing, self._columns, self._in_use = preprocessing, columns, in_use
        self._each, shape = buffer_shape(preprocessing, batch_size, in_use, CPUS_PER_PROCESS)
        self._count = max(available_cpus() // CPUS_PER_PROCESS, 1)
        self._slots = SharedBatchBuffer(self._count * self._each, shape)
        self._processes = self._begun()

    def batches(self, shards: Iterable[Shard]) -> Generator[DecodedBatch]:
        """Yield batches, decoded, as they come; a shard's spans come in their order, and the last says that it is.

        `shards` is iterated over in a thread. Each batch has to be given back. Raises what iterating or reading raises,
        and SemiscaleError where a shard is gone or a process was lost.
        """
        self._processes = self._processes or self._begun()
        supply = iter(shards)
        try:
            first = list(islice(supply, self._count))
            yield from self._received(self._processes[: len(first)], _ShardDispatcher(chain(first, supply)))
        finally:
            for process in self._processes:
                process.beside.close()
            self._processes = []

    def _received(self, running: list[_LoaderProcess], handing_out: "_ShardDispatcher") -> Generator[DecodedBatch]:
        """Yield what the processes send, the cores being theirs, until each has ended."""
        try:
            for process in running:
                process.beside.send(-(-available_cpus() // len(running)))
            while running:
                ready = wait([process.beside.connection for process in running])
                for process in [one for one in running if one.beside.connection in ready]:
                    sent = process.beside.receive()
                    if sent is None:
                        running.remove(process)
                    elif sent == _WANTED:
                        handing_out.wanted(process)
                    else:
                        yield self._prepared(process, *sent)
            handing_out.refuse_failed()
        finally:
            handing_out.stop()

    def release(self, slot: int) -> None:
        """Take the room of a batch for the next one."""
        if self._processes:  # else there is no next one
            number, own = divmod(slot, self._each)
            with suppress(OSError):  # it was lost, which whoever waits for its batches is told
                self._processes[number].beside.send(own)

    def _begun(self) -> list[_LoaderProcess]:
        return [_LoaderProcess(self._beside(first), first) for first in range(0, self._count * self._each, self._each)]

    def _beside(self, first: int) -> WorkerProcess:
        own = slice(first, first + self._each)
        arguments = self._preprocessing, self._columns, self._in_use, own, self._slots
        return WorkerProcess("reads and decodes images", _loader_main, *arguments)

    def _prepared(self, process: _LoaderProcess, own: int, spans: list[Any]) -> DecodedBatch:
        slot = process.first + own
        return DecodedBatch(slot, self._slots.pixels_SBHWC[slot], [_span(process, *sent) for sent in spans])


def _span(
    process: _LoaderProcess, start: int, seen: list[SampleInfo], read_s: float, ends: bool, listed: int
) -> ShardSpan:
    shard = process.shards.popleft() if ends else process.shards[0]
    return ShardSpan(shard, start, seen, read_s, ends, listed)


class _ShardDispatcher:
    """Hands shards to the processes that want one, in a thread of its own: to claim a shard takes a store's time."""

    def __init__(self, shards: Iterator[Shard]) -> None:
        self._shards = shards
        self._error: BaseException | None = None
        self._wanting: SimpleQueue[_LoaderProcess | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="hand out")
        self._thread.start()

    def wanted(self, process: _LoaderProcess) -> None:
        """Give a process the next shard as soon as it is there, or tell it that there is none."""
        self._wanting.put(process)

    def refuse_failed(self) -> None:
        """Raise what the shards ended in, if it was not their end."""
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Hand out no more."""
        self._wanting.put(None)
        self._thread.join(SHUTDOWN_TIMEOUT_S)

    def _run(self) -> None:
        while process := self._wanting.get():
            shard = self._next()
            if shard:
                process.shards.append(shard)
            with suppress(OSError):  # it was lost, or closed
                process.beside.send(shard)

    def _next(self) -> Shard | None:
        try:
            return next(self._shards, None)
        except BaseException as error:  # noqa: BLE001 - raised by who takes the batches, after those before it
            self._error = error
            return None


def _loader_main(
    line: Channel,
    preprocessing: Preprocessing,
    columns: SampleFields,
    in_use: int,
    own: slice,
    all_slots: SharedBatchBuffer,
) -> None:
    """Be a feed's process: told the number of threads, and then shards, where it wants one, and slots given back."""
    threads = line.connection.recv()
    feed = ShardLoader(preprocessing, columns, all_slots.pixels_SBHWC[own], in_use, threads)
    shards: SimpleQueue[Shard | None] = SimpleQueue()
    start_receiver(line, lambda sent: feed.release(sent) if isinstance(sent, int) else shards.put(sent))
    for batch in feed.batches(_requested_shards(line, shards)):
        line.send((batch.slot, [span[1:] for span in batch.spans]))
    line.send(None)


def _requested_shards(line: Channel, shards: "SimpleQueue[Shard | None]") -> Iterator[Shard]:
    while True:
        line.send(_WANTED)
        if (shard := shards.get()) is None:
            return
        yield shard
