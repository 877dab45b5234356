"""Load shards in worker processes, which a GPU needs.

Each worker process reads and decodes whole shards on a few cores, into shared memory. This process dispatches the
shards and takes the batches. Its own threads then do little work that could delay the thread that launches the GPU's
kernels.
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
from semiscale.stages.score.shard_loader import SHUTDOWN_TIMEOUT_S, DecodedBatch, SampleInfo, ShardSpan
from semiscale.stages.score.thread_shard_loader import ThreadShardLoader, buffer_shape

# So few threads of one process hardly wait for each other at the interpreter lock.
CPUS_PER_PROCESS = 4
# Message of a worker process that is ready for another shard.
_SHARD_REQUEST = "wanted"


@dataclass(frozen=True)
class _LoaderProcess:
    """A worker process that loads shards.

    Attributes:
        worker: The process.
        first_slot: First of its slots in the shared buffer.
        shards: Shards that were sent to it and have not ended, in order.
    """

    worker: WorkerProcess
    first_slot: int
    shards: deque[Shard] = field(default_factory=deque)


class ProcessShardLoader:
    """Loads shards in worker processes.

    There is one process for every CPUS_PER_PROCESS cores. The processes start at once, because their imports take
    seconds.

    Args:
        preprocessing: Resolution and resizing.
        columns: Parquet columns of the samples.
        batch_size: Number of images, or videos, in a batch.
        in_use: Number of batches that the consumer may hold at a time.

    Cost:
        Memory of each process: its slots, which are 0.23 GB of images at 224 pixels, and 0.5 GB for libraries and
        encoded images.
    """

    def __init__(self, preprocessing: Preprocessing, columns: SampleFields, batch_size: int, in_use: int) -> None:
        self._preprocessing, self._columns, self._in_use = preprocessing, columns, in_use
        self._slots_per_process, shape = buffer_shape(preprocessing, batch_size, in_use, CPUS_PER_PROCESS)
        self._num_processes = max(available_cpus() // CPUS_PER_PROCESS, 1)
        self._slots = SharedBatchBuffer(self._num_processes * self._slots_per_process, shape)
        self._processes = self._start_processes()

    def batches(self, shards: Iterable[Shard]) -> Generator[DecodedBatch]:
        """Yield decoded batches as they arrive. See ShardLoader.

        Args:
            shards: Shards to load.
        """
        # An earlier call closed its processes.
        self._processes = self._processes or self._start_processes()
        supply = iter(shards)
        try:
            first = list(islice(supply, self._num_processes))
            yield from self._receive_batches(self._processes[: len(first)], _ShardDispatcher(chain(first, supply)))
        finally:
            for process in self._processes:
                process.worker.close()
            self._processes = []

    def _receive_batches(
        self, running: list[_LoaderProcess], dispatcher: "_ShardDispatcher"
    ) -> Generator[DecodedBatch]:
        """Yield the batches of the running processes until each has ended."""
        # The processes share all cores.
        try:
            for process in running:
                process.worker.send(-(-available_cpus() // len(running)))
            while running:
                ready = wait([process.worker.connection for process in running])
                for process in [process for process in running if process.worker.connection in ready]:
                    message = process.worker.receive()
                    if message is None:
                        running.remove(process)
                    elif message == _SHARD_REQUEST:
                        dispatcher.request_shard(process)
                    else:
                        yield self._make_batch(process, *message)
            dispatcher.raise_error()
        finally:
            dispatcher.stop()

    def release(self, slot: int) -> None:
        """Free the slot of a batch for the next one."""
        # Without processes there is no next batch.
        if self._processes:
            number, local_slot = divmod(slot, self._slots_per_process)
            # A lost process is reported by `batches`, which waits for its messages.
            with suppress(OSError):
                self._processes[number].worker.send(local_slot)

    def _start_processes(self) -> list[_LoaderProcess]:
        first_slots = range(0, self._num_processes * self._slots_per_process, self._slots_per_process)
        return [_LoaderProcess(self._start_worker(first), first) for first in first_slots]

    def _start_worker(self, first_slot: int) -> WorkerProcess:
        own_slots = slice(first_slot, first_slot + self._slots_per_process)
        arguments = self._preprocessing, self._columns, self._in_use, own_slots, self._slots
        return WorkerProcess("reads and decodes images", _loader_main, *arguments)

    def _make_batch(self, process: _LoaderProcess, local_slot: int, spans: list[Any]) -> DecodedBatch:
        slot = process.first_slot + local_slot
        return DecodedBatch(slot, self._slots.pixels_SBHWC[slot], [_make_span(process, *span) for span in spans])


def _make_span(
    process: _LoaderProcess, start: int, samples: list[SampleInfo], read_s: float, is_last: bool, listed: int
) -> ShardSpan:
    """Complete a span with its shard, which worker processes do not send back."""
    shard = process.shards.popleft() if is_last else process.shards[0]
    return ShardSpan(shard, start, samples, read_s, is_last, listed)


class _ShardDispatcher:
    """Sends shards to the processes that request them.

    It runs in a thread of its own, because the next shard needs a lease, which takes requests to the store.
    """

    def __init__(self, shards: Iterator[Shard]) -> None:
        self._shards = shards
        self._error: BaseException | None = None
        self._requests: SimpleQueue[_LoaderProcess | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="dispatch")
        self._thread.start()

    def request_shard(self, process: _LoaderProcess) -> None:
        """Send a process the next shard when there is one, or None at the end."""
        self._requests.put(process)

    def raise_error(self) -> None:
        """Raise the error that ended the iteration over the shards, if there was one."""
        if self._error:
            raise self._error

    def stop(self) -> None:
        """Stop sending shards."""
        self._requests.put(None)
        self._thread.join(SHUTDOWN_TIMEOUT_S)

    def _run(self) -> None:
        while process := self._requests.get():
            shard = self._next()
            if shard:
                process.shards.append(shard)
            # The process may be lost or closed.
            with suppress(OSError):
                process.worker.send(shard)

    def _next(self) -> Shard | None:
        try:
            return next(self._shards, None)
        # The thread that takes the batches raises the error, after the batches before it.
        except BaseException as error:  # noqa: BLE001
            self._error = error
            return None


def _loader_main(
    channel: Channel,
    preprocessing: Preprocessing,
    columns: SampleFields,
    in_use: int,
    own_slots: slice,
    all_slots: SharedBatchBuffer,
) -> None:
    """Run a worker process that loads shards.

    It receives the number of threads first. After that it receives released slots, and a shard for each request.
    """
    threads = channel.connection.recv()
    loader = ThreadShardLoader(preprocessing, columns, all_slots.pixels_SBHWC[own_slots], in_use, threads)
    shards: SimpleQueue[Shard | None] = SimpleQueue()
    start_receiver(
        channel, lambda message: loader.release(message) if isinstance(message, int) else shards.put(message)
    )
    for batch in loader.batches(_request_shards(channel, shards)):
        # The shard of a span is left out, because the other process has it.
        channel.send((batch.slot, [span[1:] for span in batch.spans]))
    channel.send(None)


def _request_shards(channel: Channel, shards: "SimpleQueue[Shard | None]") -> Iterator[Shard]:
    while True:
        channel.send(_SHARD_REQUEST)
        if (shard := shards.get()) is None:
            return
        yield shard
