"""Wait for the threads that a test has started."""

import threading
import time


def wait_for_prefetch_threads() -> None:
    """Wait until all prefetching threads have ended, at most a minute."""
    deadline = time.monotonic() + 60
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
