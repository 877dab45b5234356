"""Evaluate the four models on the test set.

Learning rates are chosen on the validation set. The promote stage decides on the same test images.
"""

from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.runtime.run_once import run_once
from semiscale.stages.evaluate.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> EvaluationReceipt:
    """Evaluate teacher, baseline, pretrained and student on the same test images."""

    def work(_: str) -> dict[str, object]:
        # torch takes seconds to import, and finished work does not need it.
        from semiscale.stages.evaluate.evaluate_models import evaluate_models

        return evaluate_models(config)

    return run_once(config, EvaluationReceipt, work)


__all__ = ["EvaluateConfig", "evaluate"]
