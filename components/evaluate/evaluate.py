"""Evaluate: the four models on the test set, which chose nothing. Learning rates are chosen here, on validation."""

from components.evaluate.config import EvaluateConfig
from components.shared.receipts import EvaluationReceipt
from components.shared.stage import once


def evaluate(config: EvaluateConfig) -> EvaluationReceipt:
    """Measure teacher, baseline, pretrained and student on the same test images: top-1 and top-5, in [0, 1]."""

    def work(_: str) -> dict[str, object]:
        from components.evaluate.measure import measure  # torch takes seconds to import; finished work is found without

        return measure(config)

    return once(config, EvaluationReceipt, work)


__all__ = ["EvaluateConfig", "evaluate"]
