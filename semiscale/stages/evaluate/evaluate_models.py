"""Measuring the models on the test images."""

import numpy as np

from semiscale import storage
from semiscale.data.shard import SampleFields
from semiscale.evaluation import metrics
from semiscale.evaluation.metrics import (
    calibration_bin_terms,
    calibration_interval,
    expected_calibration_error,
    proportion_interval,
)
from semiscale.evaluation.prediction_cache import TOP_K, Predictions, SplitEvaluator
from semiscale.observability.progress import Progress, log_info
from semiscale.receipts.evaluate import ModelEvaluation, ModelMetrics, SweepTrial
from semiscale.receipts.plan import PlanReceipt
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.evaluate.config import EvaluateConfig
from semiscale.storage.documents import load_document


def evaluate_models(config: EvaluateConfig) -> dict[str, object]:
    """Measure the four models and return the fields of the receipt."""
    plan = load_document(config.plan, PlanReceipt)
    sweeps = {
        "baseline": [load_document(uri, TrainReceipt) for uri in config.baselines],
        "student": [load_document(uri, TrainReceipt) for uri in config.students],
    }
    measured = {
        "teacher": load_document(config.teacher, TrainReceipt),
        "baseline": best_by_validation(sweeps["baseline"]),
        "pretrained": load_document(config.pretrained, TrainReceipt),
        "student": best_by_validation(sweeps["student"]),
    }
    columns = SampleFields(config.image_column, config.label_column, plan.is_video)
    exam = SplitEvaluator(config.workdir, plan.test, columns, Progress("evaluate", len(measured) * plan.test.samples))
    found: dict[str, Predictions] = {}
    models: dict[str, ModelMetrics] = {}
    for name, receipt in measured.items():
        found[name] = exam.predict(receipt)
        models[name] = model_metrics(receipt, found[name], exam.predictions_uri(receipt))
        log_info("evaluate", f"{name}: top-1 {models[name].top1:.4f}, top-5 {models[name].top5:.4f}")
    per_class = {
        name: metrics.per_class_accuracy(one.correct(), one.labels_B, len(plan.classes)) for name, one in found.items()
    }
    student = found["student"]
    return {
        "models": models,
        "per_class": {name: shares for name, (shares, _) in per_class.items()},
        "per_class_intervals": {name: intervals for name, (_, intervals) in per_class.items()},
        "chosen": {name: measured[name].learning_rate for name in sweeps},
        "tried": {name: sweep_trials(receipts) for name, receipts in sweeps.items()},
        "comparisons": [
            metrics.compare_paired("student", student.correct(), name, other.correct())
            for name, other in found.items()
            if name != "student"
        ],
        "confusion": metrics.confusion_matrix(student.labels_B, student.top_BR[:, 0], plan.classes),
    }


def evaluate_model(exam: SplitEvaluator, receipt: TrainReceipt) -> ModelEvaluation:
    """Measure a single model."""
    found = exam.predict(receipt)
    per_class, intervals = metrics.per_class_accuracy(found.correct(), found.labels_B, len(receipt.classes))
    return ModelEvaluation(
        model=model_metrics(receipt, found, exam.predictions_uri(receipt)),
        classes=receipt.classes,
        per_class=per_class,
        per_class_intervals=intervals,
        confusion=metrics.confusion_matrix(found.labels_B, found.top_BR[:, 0], receipt.classes),
    )


def best_by_validation(receipts: list[TrainReceipt]) -> TrainReceipt:
    """Choose by validation top-1; of equals, the smallest learning rate."""
    return min(receipts, key=lambda receipt: (-receipt.validation_top1, receipt.learning_rate))


def sweep_trials(receipts: list[TrainReceipt]) -> list[SweepTrial]:
    """List a sweep in order of its learning rates."""
    in_order = sorted(receipts, key=lambda receipt: receipt.learning_rate)
    return [
        SweepTrial(learning_rate=one.learning_rate, validation_top1=one.validation_top1, receipt=one.digest)
        for one in in_order
    ]


def model_metrics(receipt: TrainReceipt, found: Predictions, uri: str) -> ModelMetrics:
    """Measure one model, with the intervals that resampling the test images gives."""
    values = np.column_stack(
        [found.correct(1), found.correct(TOP_K), calibration_bin_terms(found.correct(1), found.probability_B)]
    )
    images, means, resampled = len(values), values.mean(0), metrics.bootstrap_means(values)
    return ModelMetrics(
        top1=float(means[0]),
        top5=float(means[1]),
        calibration_error=float(expected_calibration_error(means[2:])),
        top1_interval=proportion_interval(means[0], images, resampled[:, 0]),
        top5_interval=proportion_interval(means[1], images, resampled[:, 1]),
        calibration_error_interval=calibration_interval(means[2:], resampled[:, 2:]),
        images=images,
        architecture=receipt.architecture,
        receipt=receipt.digest,
        training=storage.join(receipt.folder, "receipt.json"),
        predictions=uri,
        learning_rate=receipt.learning_rate,
    )
