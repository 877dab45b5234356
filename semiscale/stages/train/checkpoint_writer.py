"""Write checkpoints while the training goes on.

The state is copied to host memory between two steps. A thread writes the copy. The training waits for the copy only.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future

from torch import Tensor

from semiscale.common.errors import SemiscaleError
from semiscale.common.prefetch import run_in_thread
from semiscale.observability.progress import log_info
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress

# Largest share of the time that checkpoints may take from the training.
MAX_COST = 0.01


class CheckpointWriter:
    """Writes the checkpoints of one training, so often that they cost at most MAX_COST of its time.

    Args:
        checkpoints: Checkpoints of the training.
        name: Name of the training in its log.
        interval_s: Seconds between two checkpoints, if that costs at most MAX_COST. At 0 each checkpoint is written
            before the training goes on.
        shares_cpu: Whether the training runs on the CPU. The time of the thread is part of the cost then.

    Cost:
        One copy of the state in host memory, which is 6.6 GB for the paper's largest network. A killed process loses
        the work since its last complete checkpoint: the interval, and the time of one write.
    """

    def __init__(self, checkpoints: CheckpointManager, name: str, interval_s: float, *, shares_cpu: bool) -> None:
        self._checkpoints, self._name = checkpoints, name
        self._interval_s, self._shares_cpu = interval_s, shares_cpu
        self._copied_at = time.monotonic()
        self._copy_s = self._thread_s = 0.0
        # Seconds that the last complete checkpoint took to write.
        self.write_s = 0.0
        self._writing: Future[None] | None = None

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints, by the cost of the last one."""
        cost_s = self._copy_s + (self._thread_s if self._shares_cpu else 0.0)
        return max(self._interval_s, cost_s / MAX_COST) if self._interval_s else 0.0

    def is_due(self) -> bool:
        """Return whether the next checkpoint must be written now.

        Raises:
            SemiscaleError: The last checkpoint has weights that are not finite.
            OSError: The last checkpoint could not be written.
        """
        if self._writing and not self._writing.done():
            return False
        self.wait()
        return time.monotonic() - self._copied_at >= self.interval_s

    def save(self, progress: TrainerProgress, tensors: Mapping[str, Tensor]) -> None:
        """Copy the state, and start to write it. The checkpoint before it is completed first.

        Args:
            progress: Progress at this checkpoint.
            tensors: State of the training by name, on any device.

        Raises:
            SemiscaleError: Weights are not finite.
            OSError: The store or the disk failed.
        """
        self.wait()
        self._copied_at = time.monotonic()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._copy_s = time.monotonic() - self._copied_at
        self._writing = run_in_thread(lambda: self._write(progress, copies))
        if not self._interval_s:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            SemiscaleError: Weights are not finite.
            OSError: The store or the disk failed.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, progress: TrainerProgress, tensors: Mapping[str, Tensor]) -> None:
        started, cpu_started = time.monotonic(), time.thread_time()
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise SemiscaleError(
                "SEMI-E235",
                f"train: {self._name}: weights are not finite after step {progress.step:,}. Lower the learning rate.",
            )
        self._checkpoints.save(progress, tensors)
        self.write_s, self._thread_s = time.monotonic() - started, time.thread_time() - cpu_started
        log_info("train", f"{self._name}: checkpoint after {progress.images_processed:,} images")
