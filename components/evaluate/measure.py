"""Measuring the models on the test images."""

import numpy as np

from components.evaluate.config import EvaluateConfig
from components.shared import measures, storage
from components.shared.measures import calibration_error, calibration_interval, calibration_terms, share_interval
from components.shared.predictions import TOP, Exam, Predictions
from components.shared.progress import Progress, say
from components.shared.receipts import Accuracy, Measurement, PlanReceipt, TrainReceipt, Tried, load
from components.shared.shards import Columns


def measure(config: EvaluateConfig) -> dict[str, object]:
    """Measure the four models and return the fields of the receipt."""
    plan = load(config.plan, PlanReceipt)
    sweeps = {
        "baseline": [load(uri, TrainReceipt) for uri in config.baselines],
        "student": [load(uri, TrainReceipt) for uri in config.students],
    }
    measured = {
        "teacher": load(config.teacher, TrainReceipt),
        "baseline": best(sweeps["baseline"]),
        "pretrained": load(config.pretrained, TrainReceipt),
        "student": best(sweeps["student"]),
    }
    columns = Columns(config.image_column, config.label_column, plan.videos)
    exam = Exam(config.workdir, plan.test, columns, Progress("evaluate", len(measured) * plan.test.samples))
    found: dict[str, Predictions] = {}
    models: dict[str, Accuracy] = {}
    for name, receipt in measured.items():
        found[name] = exam.predictions(receipt)
        models[name] = accuracy(receipt, found[name], exam.uri(receipt))
        say("evaluate", f"{name}: top-1 {models[name].top1:.4f}, top-5 {models[name].top5:.4f}")
    per_class = {name: measures.by_class(one.right(), one.labels_B, len(plan.classes)) for name, one in found.items()}
    student = found["student"]
    return {
        "models": models,
        "per_class": {name: shares for name, (shares, _) in per_class.items()},
        "per_class_intervals": {name: intervals for name, (_, intervals) in per_class.items()},
        "chosen": {name: measured[name].learning_rate for name in sweeps},
        "tried": {name: tried(receipts) for name, receipts in sweeps.items()},
        "comparisons": [
            measures.compare("student", student.right(), name, other.right())
            for name, other in found.items()
            if name != "student"
        ],
        "confusion": measures.confusion(student.labels_B, student.top_BR[:, 0], plan.classes),
    }


def measure_one(exam: Exam, receipt: TrainReceipt) -> Measurement:
    """Measure a single model."""
    found = exam.predictions(receipt)
    per_class, intervals = measures.by_class(found.right(), found.labels_B, len(receipt.classes))
    return Measurement(
        model=accuracy(receipt, found, exam.uri(receipt)),
        classes=receipt.classes,
        per_class=per_class,
        per_class_intervals=intervals,
        confusion=measures.confusion(found.labels_B, found.top_BR[:, 0], receipt.classes),
    )


def best(receipts: list[TrainReceipt]) -> TrainReceipt:
    """Choose by validation top-1; of equals, the smallest learning rate."""
    return min(receipts, key=lambda receipt: (-receipt.validation_top1, receipt.learning_rate))


def tried(receipts: list[TrainReceipt]) -> list[Tried]:
    """List a sweep in order of its learning rates."""
    in_order = sorted(receipts, key=lambda receipt: receipt.learning_rate)
    return [
        Tried(learning_rate=one.learning_rate, validation_top1=one.validation_top1, receipt=one.digest)
        for one in in_order
    ]


def accuracy(receipt: TrainReceipt, found: Predictions, uri: str) -> Accuracy:
    """Measure one model, with the intervals that resampling the test images gives."""
    values = np.column_stack([found.right(1), found.right(TOP), calibration_terms(found.right(1), found.probability_B)])
    images, means, resampled = len(values), values.mean(0), measures.resampled_means(values)
    return Accuracy(
        top1=float(means[0]),
        top5=float(means[1]),
        calibration_error=float(calibration_error(means[2:])),
        top1_interval=share_interval(means[0], images, resampled[:, 0]),
        top5_interval=share_interval(means[1], images, resampled[:, 1]),
        calibration_error_interval=calibration_interval(means[2:], resampled[:, 2:]),
        images=images,
        architecture=receipt.architecture,
        receipt=receipt.digest,
        training=storage.join(receipt.folder, "receipt.json"),
        predictions=uri,
        learning_rate=receipt.learning_rate,
    )
