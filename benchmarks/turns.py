"""Run contestants in turns of a second, so that the machine's load affects all alike.

A cloud machine may work half as fast in one minute as in the next. Consecutive runs would then compare the minutes,
and not the programs. Here all contestants are alive at once, each in its own process. All but one are stopped
(SIGSTOP) with every process that they started. Only their own turns count.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TURN_S = 1.0
READY = "ready"


class Contestant:
    """A process that prints `ready`, waits for a line, and from then on prints lines; stopped but for its turns."""

    def __init__(self, name: str, command: list[str]) -> None:
        """Start it, and stop it when it is ready. Raises ChildProcessError where it ends before."""
        self.name = name
        self.lines: list[tuple[float, str]] = []
        self._ran_s, self._since = 0.0, 0.0
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        for line in self._process.stdout:
            if line.strip() == READY:
                break
        else:
            raise ChildProcessError(f"{name}: ended before it was ready")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._signal(signal.SIGSTOP)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @property
    def ended(self) -> bool:
        """Say whether it has closed its output."""
        return not self._listening.is_alive()

    def turn(self, seconds: float) -> float:
        """Let it run for so long, or until it ends; returns the seconds that it has run in all its turns."""
        self._since = time.monotonic()
        self._signal(signal.SIGCONT)
        self._listening.join(seconds)
        self._signal(signal.SIGSTOP)
        self._ran_s, self._since = self._clock(), 0.0
        return self._ran_s

    def kill(self) -> None:
        """End it and everything that it has started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _clock(self) -> float:
        return self._ran_s + (time.monotonic() - self._since if self._since else 0.0)

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append((self._clock(), line.strip()))

    def _signal(self, number: signal.Signals) -> None:
        for process in list(family(self._process.pid)):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue  # it has ended meanwhile


def family(process: int) -> Iterator[int]:
    """Yield a process and all that descend from it, as Linux lists them."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue  # the thread has ended meanwhile
        for child in found:
            yield from family(int(child))


def wait_for_go() -> None:
    """In a contestant: say that all is prepared, and wait for the first turn."""
    print(READY, flush=True)
    sys.stdin.readline()


def by_turns(commands: dict[str, list[str]], seconds: float) -> dict[str, list[tuple[float, str]]]:
    """Let processes take turns until each has ended or has run for so many seconds; one that is alone is not stopped.

    Returns what each has printed: lines, and at how many seconds of its own turns. Memory is that of all together.
    """
    contestants: list[Contestant] = []
    try:
        for name, command in commands.items():
            contestants.append(Contestant(name, command))
        running = list(contestants)
        while running:
            turn_s = TURN_S if len(running) > 1 else seconds
            running = [one for one in running if one.turn(turn_s) < seconds and not one.ended]
        return {one.name: list(one.lines) for one in contestants}
    finally:
        for one in contestants:
            one.kill()
