"""Hold and break scoring pods. Python imports this module at its start if its folder is on PYTHONPATH.

The folder SCAN_FAULTS says what happens to the pods of a Job when they hold their first shard. The file `hold` makes
them wait while it exists. The file `fail-<index>` has the exit code of a pod. Each pod leaves a file in `started`.
"""

import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

if "SCAN_FAULTS" in os.environ and "semiscale.stages.score" in sys.orig_argv:
    from semiscale.common.errors import InvalidInputError, SemiscaleError
    from semiscale.runtime import follower
    from semiscale.stages.score import stage
    from semiscale.storage import leases

    FOLDER = Path(os.environ["SCAN_FAULTS"])
    INDEX = os.environ.get("JOB_COMPLETION_INDEX", "")
    # The work of a killed pod is free soon, and a lost follower is noticed soon.
    leases.LEASE_DURATION_S, leases.RENEW_INTERVAL_S = 15.0, 1.0
    follower.HEARTBEAT_INTERVAL_S = 0.5
    follower.FOLLOWER_TIMEOUT_S = float(os.environ["FOLLOWER_TIMEOUT_S"])

    _score = stage._ShardScoring._score

    def _hold_and_score(self: Any, leased: Iterator[Any]) -> None:
        if (first := next(leased, None)) is None:
            return
        (FOLDER / "started" / f"{INDEX}-{os.getpid()}").touch()
        failure = FOLDER / f"fail-{INDEX}"
        if failure.exists():
            if failure.read_text() == "2":
                raise InvalidInputError("SEMI-E270", "the test refuses this pod")
            raise SemiscaleError("SEMI-E001", "the test breaks this pod")
        while (FOLDER / "hold").exists():
            time.sleep(0.1)
        _score(self, chain([first], leased))

    stage._ShardScoring._score = _hold_and_score  # type: ignore[method-assign]
