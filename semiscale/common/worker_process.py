"""Run work in a worker process.

Results go through a pipe, and pixels through shared memory. Python runs one thread of a process at a time. Threads that
read and decode thousands of images a second delay the thread that launches a GPU's kernels. A step of ResNet-50 took
26 ms with such threads and 18 ms without.

The worker process ends when its parent does, because the pipe is closed then. The shared memory is anonymous
(memfd_create(2), Linux). It does not count against /dev/shm, which is 64 MiB in a pod by default.
"""

import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from traceback import format_exception
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semiscale.common.errors import SemiscaleError


class SharedBatchBuffer:
    """Memory for some batches of one shape, which worker processes share.

    A worker process that gets the buffer as an argument of its work maps the same memory. The axes of `pixels_SBHWC`
    are the batch's slot, then the sample, height, width and color channel.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        file = os.memfd_create("slots")
        os.ftruncate(file, count * math.prod(shape))
        self.__setstate__((file, (count, *shape)))

    def __getstate__(self) -> tuple[int, tuple[int, ...]]:
        return self.file, self.pixels_SBHWC.shape

    def __setstate__(self, state: tuple[int, tuple[int, ...]]) -> None:
        self.file, shape = state
        weakref.finalize(self, os.close, self.file)
        self.pixels_SBHWC: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self.file, 0), np.uint8).reshape(shape)


class Channel:
    """One end of the pipe between two processes. Any thread may send."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection
        self._lock = threading.Lock()

    def send(self, item: Any) -> None:
        """Send a picklable item.

        Raises:
            OSError: The other process has ended.
        """
        with self._lock:
            self.connection.send(item)


class _RemoteError(NamedTuple):
    """The error that ended the worker process."""

    error: Exception


class WorkerProcess:
    """A process that runs `work(channel, *arguments)`.

    Args:
        what: What the process does, for the message of an error, such as `decodes images`.
        work: Function of a module. It gets the worker's end of the channel.
        arguments: Picklable arguments of `work`. A SharedBatchBuffer among them is shared.
    """

    def __init__(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        self._what = what
        own_end, worker_end = Pipe()
        buffers = [argument.file for argument in arguments if isinstance(argument, SharedBatchBuffer)]
        command = [sys.executable, "-m", "semiscale.common.worker_process", str(worker_end.fileno())]
        # The work starts its own threads. A library must not start more for each of them.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # The command is this program itself.
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, pass_fds=[worker_end.fileno(), *buffers], env=environment
        )
        worker_end.close()
        self.connection, self.send = own_end, Channel(own_end).send
        self.send((work, arguments))

    def receive(self) -> Any:
        """Wait for the next item that the work sends, and return it.

        Raises:
            SemiscaleError: The work raised it, or the process ended without an error.
            OSError: The work raised it.
            RuntimeError: The work raised another error. The message is its traceback.
        """
        try:
            item = self.connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            raise SemiscaleError(
                "SEMI-E004",
                f"worker process: the process that {self._what} ended with exit code {code}. "
                "Give the pod more memory if it ran out of it.",
            ) from None
        if isinstance(item, _RemoteError):
            raise item.error
        return item

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


def start_receiver(channel: Channel, handle: Callable[[Any], None]) -> None:
    """Receive items in a thread of the worker process, until the parent process ends.

    Args:
        channel: The worker's end of the channel.
        handle: Function that is called with every item.
    """
    threading.Thread(target=_receive_loop, args=(channel, handle), daemon=True, name="listen").start()


def _receive_loop(channel: Channel, handle: Callable[[Any], None]) -> None:
    with suppress(EOFError, OSError):
        while True:
            handle(channel.connection.recv())
    # The parent has closed the pipe, so nobody needs the results of the other threads.
    os._exit(0)


def _to_picklable(error: Exception) -> Exception:
    """Return an error that can be sent.

    Errors of libraries often cannot be pickled.
    """
    if isinstance(error, SemiscaleError):
        return error
    return OSError(str(error)) if isinstance(error, OSError) else RuntimeError("".join(format_exception(error)))


def worker_main() -> None:
    """Run the worker process.

    It ignores Ctrl-C and SIGTERM, because its parent handles them and decides when the work stops.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(Connection(int(sys.argv[1])))
    with suppress(EOFError, BrokenPipeError):
        try:
            work, arguments = channel.connection.recv()
            work(channel, *arguments)
        # `receive` raises the error in the parent process.
        except Exception as error:  # noqa: BLE001
            channel.send(_RemoteError(_to_picklable(error)))


if __name__ == "__main__":
    # Classes of `__main__` cannot be unpickled in the parent process, so the module is imported by its name.
    from semiscale.common import worker_process

    worker_process.worker_main()
