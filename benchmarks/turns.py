"""Run contestants in turns of a second, so that load affects all alike.

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
from contextlib import suppress
from pathlib import Path

TURN_S = 1.0
READY = "ready"


class Contestant:
    """A process that runs only in its turns.

    It prints `ready`, waits for a line on its input, and then prints lines.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        """Start the process, and stop it when it is ready.

        Args:
            name: The name of the contestant.
            command: The command line.

        Raises:
            ChildProcessError: The process ended before it was ready.
        """
        self.name = name
        self.lines: list[tuple[float, str]] = []
        self._ran_s, self._turn_start_s = 0.0, 0.0
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
    def has_ended(self) -> bool:
        """Return whether the process has closed its output."""
        return not self._listening.is_alive()

    def run_turn(self, seconds: float) -> float:
        """Let the process run for a time or until it ends.

        Returns:
            The seconds of all its turns.
        """
        self._turn_start_s = time.monotonic()
        self._signal(signal.SIGCONT)
        self._listening.join(seconds)
        self._signal(signal.SIGSTOP)
        self._ran_s, self._turn_start_s = self._clock(), 0.0
        return self._ran_s

    def kill(self) -> None:
        """Kill the process and all its descendants."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _clock(self) -> float:
        return self._ran_s + (time.monotonic() - self._turn_start_s if self._turn_start_s else 0.0)

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append((self._clock(), line.strip()))

    def _signal(self, number: signal.Signals) -> None:
        for process in list(process_tree(self._process.pid)):
            # A descendant may have ended meanwhile.
            with suppress(ProcessLookupError):
                os.kill(process, number)


def process_tree(process: int) -> Iterator[int]:
    """Yield the ids of a process and all its descendants, as Linux lists them."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            child_ids = children.read_text().split()
        except OSError:
            # The thread has ended meanwhile.
            continue
        for child in child_ids:
            yield from process_tree(int(child))


def wait_for_go() -> None:
    """Report in a contestant that all is prepared, and wait for the first turn."""
    print(READY, flush=True)
    sys.stdin.readline()


def by_turns(commands: dict[str, list[str]], seconds: float) -> dict[str, list[tuple[float, str]]]:
    """Let processes take turns until each has ended or has used up its time.

    A process that is alone is not stopped between turns.

    Args:
        commands: The command line of each contestant.
        seconds: The time of each contestant.

    Returns:
        The lines that each contestant has printed, each after the seconds of its own turns.

    Cost:
        All contestants are in memory at the same time.
    """
    contestants: list[Contestant] = []
    try:
        for name, command in commands.items():
            contestants.append(Contestant(name, command))
        running = list(contestants)
        while running:
            turn_s = TURN_S if len(running) > 1 else seconds
            running = [
                contestant
                for contestant in running
                if contestant.run_turn(turn_s) < seconds and not contestant.has_ended
            ]
        return {contestant.name: list(contestant.lines) for contestant in contestants}
    finally:
        for contestant in contestants:
            contestant.kill()
