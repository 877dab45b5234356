"""Evaluate: the four models on the test set, which chose nothing. Learning rates are chosen here, on validation."""

from semiscale.receipts.evaluate import EvaluationReceipt
from semiscale.runtime.run_once import run_once
from semiscale.stages.evaluate.config import EvaluateConfig


def evaluate(config: EvaluateConfig) -> EvaluationReceipt:
    """Measure teacher, baseline, pretrained and student on the same test images: top-1 and top-5, in [0, 1]."""

    def work(_: str) -> dict[str, object]:
        from semiscale.stages.evaluate.evaluate_models import (
            evaluate_models,  # torch takes seconds to import; finished work is found without
        )

        return evaluate_models(config)

    return run_once(config, EvaluationReceipt, work)


__all__ = ["EvaluateConfig", "evaluate"]
