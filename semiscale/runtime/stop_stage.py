"""Stop the stage of this container, and wait until it has saved its work.

Kubernetes runs `python3 -m semiscale.runtime.stop_stage` in a container before it ends the container, if an admission
policy asks for it (manifests/components). The signals of Kubernetes alone do not reach a stage under kfp's launcher.
"""

import os
import select
import signal
from contextlib import suppress

from semiscale.runtime.supervisor import PID_FILE, SAVE_SIGNAL

POLL_INTERVAL_S = 0.1


def stop_stage() -> None:
    """Ask the supervisor of this container to stop its stage, and wait until the stage has ended.

    Nothing happens if no stage runs.
    """
    # The stage has ended already.
    with suppress(FileNotFoundError, ProcessLookupError):
        supervisor = os.pidfd_open(int(PID_FILE.read_text()))
        try:
            signal.pidfd_send_signal(supervisor, SAVE_SIGNAL)
            # The supervisor deletes the file when the stage has ended. It then waits for the end of the container. The
            # descriptor of a process becomes readable when the process ends (pidfd_open(2)).
            while PID_FILE.exists() and not select.select([supervisor], [], [], POLL_INTERVAL_S)[0]:
                pass
        finally:
            os.close(supervisor)


if __name__ == "__main__":
    stop_stage()
