"""Evaluate models on the test images."""

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
    """Evaluate the four models and return the fields of the receipt.

    Cost:
        One forward pass of each model over the test images, unless its predictions are stored. This does not grow with
        the pool.
    """
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
    progress = Progress("evaluate", len(measured) * plan.test.samples, unit="predictions")
    evaluator = SplitEvaluator(config.workdir, plan.test, columns, progress)
    predictions_of: dict[str, Predictions] = {}
    models: dict[str, ModelMetrics] = {}
    for name, receipt in measured.items():
        predictions_of[name] = evaluator.predict(receipt)
        models[name] = model_metrics(receipt, predictions_of[name], evaluator.predictions_uri(receipt))
        log_info("evaluate", f"{name}: top-1 {models[name].top1:.4f}, top-5 {models[name].top5:.4f}")
    per_class = {
        name: metrics.per_class_accuracy(predictions.correct(), predictions.labels_B, len(plan.classes))
        for name, predictions in predictions_of.items()
    }
    student = predictions_of["student"]
    return {
        "models": models,
        "per_class": {name: shares for name, (shares, _) in per_class.items()},
        "per_class_intervals": {name: intervals for name, (_, intervals) in per_class.items()},
        "chosen": {name: measured[name].learning_rate for name in sweeps},
        "tried": {name: sweep_trials(receipts) for name, receipts in sweeps.items()},
        "comparisons": [
            metrics.compare_paired("student", student.correct(), name, other.correct())
            for name, other in predictions_of.items()
            if name != "student"
        ],
        "confusion": metrics.confusion_matrix(student.labels_B, student.top_BR[:, 0], plan.classes),
    }


def evaluate_model(evaluator: SplitEvaluator, receipt: TrainReceipt) -> ModelEvaluation:
    """Evaluate one model.

    Args:
        evaluator: Predicts on the test images, or loads stored predictions.
        receipt: Receipt of the model's training.

    Returns:
        Metrics of the model, accuracies of each class and the confusion matrix.
    """
    predictions = evaluator.predict(receipt)
    per_class, intervals = metrics.per_class_accuracy(predictions.correct(), predictions.labels_B, len(receipt.classes))
    return ModelEvaluation(
        model=model_metrics(receipt, predictions, evaluator.predictions_uri(receipt)),
        classes=receipt.classes,
        per_class=per_class,
        per_class_intervals=intervals,
        confusion=metrics.confusion_matrix(predictions.labels_B, predictions.top_BR[:, 0], receipt.classes),
    )


def best_by_validation(receipts: list[TrainReceipt]) -> TrainReceipt:
    """Return the training with the best validation top-1.

    Of equally good ones it is the one with the smallest learning rate.
    """
    return min(receipts, key=lambda receipt: (-receipt.validation_top1, receipt.learning_rate))


def sweep_trials(receipts: list[TrainReceipt]) -> list[SweepTrial]:
    """Return the trials of a sweep in the order of their learning rates."""
    in_order = sorted(receipts, key=lambda receipt: receipt.learning_rate)
    return [
        SweepTrial(learning_rate=receipt.learning_rate, validation_top1=receipt.validation_top1, receipt=receipt.digest)
        for receipt in in_order
    ]


def model_metrics(receipt: TrainReceipt, predictions: Predictions, uri: str) -> ModelMetrics:
    """Compute the metrics of one model with bootstrap intervals.

    Args:
        receipt: Receipt of the model's training.
        predictions: Its predictions on the test images.
        uri: URI of the stored predictions.

    Returns:
        The metrics.
    """
    values = np.column_stack(
        [
            predictions.correct(1),
            predictions.correct(TOP_K),
            calibration_bin_terms(predictions.correct(1), predictions.probability_B),
        ]
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
