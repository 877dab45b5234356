"""Measure a model on the validation split while it is trained."""

from typing import NamedTuple

import torch
from torch import nn

from semiscale.common.signals import GracefulStop, TerminatedError
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.evaluation.metrics import topk_correct
from semiscale.stages.train.distributed import DistributedContext


class ValidationResult(NamedTuple):
    """The result of one validation. Only rank 0 has a score."""

    is_complete: bool
    top1: float | None = None


class Validator:
    """Measure top-1 accuracy on rank 0, while the others wait and look for SIGTERM.

    Args:
        loader: The validation split. It is None on all ranks but rank 0.
        device: Device of the model.
        ranks: This process among those of the training.
        stopping: The request to stop of this process.
    """

    def __init__(
        self, loader: EvalLoader | None, device: torch.device, ranks: DistributedContext, stopping: GracefulStop
    ) -> None:
        self._loader, self._device, self._ranks, self._stopping = loader, device, ranks, stopping

    def all_reduce_validate(self, model: nn.Module) -> ValidationResult:
        """Measure the model, unless a rank receives SIGTERM meanwhile.

        This broadcasts once and all-reduces after every batch, so every rank must call it. A validation may take longer
        than the grace period of a pod.

        Args:
            model: The model to measure.

        Returns:
            Whether the validation is complete, which is the same on all ranks, and the score on rank 0.
        """
        num_batches = self._ranks.broadcast_from_main(self._loader.num_batches if self._loader else 0)
        stop_requests = (self._ranks.all_reduce_any_async(self._stopping.is_requested)() for _ in range(num_batches))
        if not self._loader:
            return ValidationResult(not any(stop_requests))

        def raise_if_stop_requested(_: int) -> None:
            if next(stop_requests):
                self._stopping.raise_now()

        try:
            logits_BC = predict_logits(model, self._loader, self._device, raise_if_stop_requested)
            correct_B = topk_correct(logits_BC.topk(1).indices, self._loader.labels_B, 1)
        except TerminatedError:
            return ValidationResult(False)
        return ValidationResult(True, float(correct_B.float().mean()))
