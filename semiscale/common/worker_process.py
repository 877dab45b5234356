"""Run work in a process of its own, which sends results through a pipe and pixels through shared memory.

Python runs one thread of a process at a time. Threads that read and decode thousands of images a second delay the one
that launches a GPU's kernels. A step of ResNet-50 took 26 ms with such threads and 18 ms without.

The process ends when its parent does, because the pipe is closed then. The shared memory is anonymous (memfd_create(2),
Linux). It is not part of /dev/shm, of which a pod has 64 MiB by default.
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
    """Room for some batches of one shape, pixels_SBHWC, shared with the processes that get it as an argument."""

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
        self._turn = threading.Lock()

    def send(self, item: Any) -> None:
        """Send a picklable item. Raises OSError if the other process has ended."""
        with self._turn:
            self.connection.send(item)


class _RemoteError(NamedTuple):
    """The error that ended the other process."""

    error: Exception


class WorkerProcess:
    """A process that runs `work(line, *arguments)`, a function of a module, with slots among its arguments or none."""

    def __init__(self, what: str, work: Callable[..., None], *arguments: Any) -> None:
        self._what = what
        here, there = Pipe()
        files = [there.fileno(), *(argument.file for argument in arguments if isinstance(argument, SharedBatchBuffer))]
        command = [sys.executable, "-m", "semiscale.common.worker_process", str(there.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as the work has, and no more for each
        self._process = subprocess.Popen(  # noqa: S603 - this program
            command, stdin=subprocess.DEVNULL, pass_fds=files, env=environment
        )
        there.close()
        self.connection, self.send = here, Channel(here).send
        self.send((work, arguments))

    def receive(self) -> Any:
        """Return the next that the work has sent; waits for it.

        Raises what ended the work, a SemiscaleError or an OSError, and RuntimeError with the traceback of anything
        else; SemiscaleError where the process was lost.
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


def start_receiver(line: Channel, take: Callable[[Any], None]) -> None:
    """In the other process: pass on what is sent to it, in a thread of its own, and end when nobody is left to send."""
    threading.Thread(target=_receive_loop, args=(line, take), daemon=True, name="listen").start()


def _receive_loop(line: Channel, take: Callable[[Any], None]) -> None:
    with suppress(EOFError, OSError):
        while True:
            take(line.connection.recv())
    os._exit(0)


def _picklable(error: Exception) -> Exception:
    """Return what can be sent of an error: a library's own kind of it often cannot."""
    if isinstance(error, SemiscaleError):
        return error
    return OSError(str(error)) if isinstance(error, OSError) else RuntimeError("".join(format_exception(error)))


def worker_main() -> None:
    """Be the other process. Ctrl-C and SIGTERM are for the one that started it, which says when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = Channel(Connection(int(sys.argv[1])))
    with suppress(EOFError, BrokenPipeError):
        try:
            work, arguments = line.connection.recv()
            work(line, *arguments)
        except Exception as error:  # noqa: BLE001 - raised by `receive`
            line.send(_RemoteError(_picklable(error)))


if __name__ == "__main__":
    from semiscale.common import (
        worker_process,  # what it sends must be of a module that the one that receives it can name
    )

    worker_process.worker_main()
