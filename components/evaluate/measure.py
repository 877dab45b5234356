"""Measuring the models. Only this module of the stage knows torch."""

from components.evaluate.config import EvaluateConfig
from components.shared import models
from components.shared.predict import PreparedSplit, hits, logits
from components.shared.progress import say
from components.shared.receipts import Accuracy, PlanReceipt, TrainReceipt, load
from components.shared.shards import Columns


def measure(config: EvaluateConfig) -> dict[str, object]:
    """Measure the four models and return the fields of the receipt."""
    models.use_threads()
    plan = load(config.plan, PlanReceipt)
    measured = {
        "teacher": load(config.teacher, TrainReceipt),
        "baseline": best([load(uri, TrainReceipt) for uri in config.baselines]),
        "pretrained": load(config.pretrained, TrainReceipt),
        "student": best([load(uri, TrainReceipt) for uri in config.students]),
    }
    prepared = PreparedSplit(
        plan.test, Columns(config.image_column, config.label_column), measured["teacher"].preprocessing
    )
    accuracies, per_class = {}, {}
    for name, receipt in measured.items():
        accuracies[name], per_class[name] = accuracy(receipt, prepared)
        say("evaluate", f"{name}: top-1 {accuracies[name].top1:.4f}, top-5 {accuracies[name].top5:.4f}")
    chosen = {name: measured[name].learning_rate for name in ("baseline", "student")}
    return {"models": accuracies, "per_class": per_class, "chosen": chosen}


def best(receipts: list[TrainReceipt]) -> TrainReceipt:
    """Choose by validation top-1; of equals, the smallest learning rate."""
    return min(receipts, key=lambda receipt: (-receipt.validation_top1, receipt.learning_rate))


def accuracy(receipt: TrainReceipt, prepared: PreparedSplit) -> tuple[Accuracy, list[float]]:
    """Measure one model; returns its accuracy and its top-1 on the images of each class."""
    model = models.read(receipt.checkpoint)[0].to(models.device())
    found = logits(model, prepared, models.device())
    right = hits(found, prepared.labels_B, 1).double()
    per_class = [float(right[prepared.labels_B == label].mean()) for label in range(len(receipt.classes))]
    return Accuracy(
        top1=float(right.mean()),
        top5=float(hits(found, prepared.labels_B, 5).double().mean()),
        images=len(right),
        architecture=receipt.architecture,
        receipt=receipt.digest,
        learning_rate=receipt.learning_rate,
    ), per_class
