"""Pass parameters from the run file and from earlier receipts to the stages.

Each function returns the fields of one stage's config, as `pipeline.py` and `components/*/component.py` pass them at
revision f0b0de0. If parameters are passed in another way, this module changes. The digests must not change, because
they are part of the names of objects in users' workdirs.
"""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]


@dataclass
class Receipts:
    """The URIs of a run's receipts."""

    plan: str = ""
    teacher: str = ""
    unscored: str = ""
    scores: list[str] = field(default_factory=list)
    selection: str = ""
    unpacked: str = ""
    packed: str = ""
    pretrained: str = ""
    students: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    evaluation: str = ""
    promotion: str = ""


def pick(run: Fields, *names: str) -> Fields:
    """Return some of a run's parameters."""
    return {name: run[name] for name in names}


def plan(run: Fields) -> Fields:
    """Return the fields of the plan, which are all parameters."""
    return dict(run)


def training(run: Fields, receipts: Receipts) -> Fields:
    """Return the common fields of all trainings of a run."""
    shared = ("batch_size", "device_batch_size", "weight_decay", "resolution", "augmentation", "frames", "seed")
    return {"plan": receipts.plan, **pick(run, "workdir", "image_column", "label_column", *shared)}


def teacher(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the teacher's training."""
    return {
        "recipe": "teacher",
        "architecture": run["teacher_architecture"],
        "images_processed": run["teacher_images_processed"],
        "learning_rate": run["teacher_learning_rate"],
        "own_frames": run["teacher_frames"],
        "start_weights": run["teacher_start_weights"],
        "checkpoint": run["teacher_checkpoint"],
        "checkpoint_classes": run["teacher_classes"],
        **training(run, receipts),
    }


def pretrain(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the student's pre-training."""
    return {
        "recipe": "pretrain",
        "architecture": run["student_architecture"],
        "images_processed": run["pretrain_images_processed"],
        "learning_rate": run["pretrain_learning_rate"],
        "packed": receipts.packed,
        "start_weights": run["student_start_weights"],
        **training(run, receipts),
    }


def finetune(run: Fields, receipts: Receipts, learning_rate: float) -> Fields:
    """Return the fields of the student's fine-tuning at one learning rate."""
    return {
        "recipe": "finetune",
        "architecture": run["student_architecture"],
        "epochs": run["finetune_epochs"],
        "learning_rate": learning_rate,
        "start": receipts.pretrained,
        **training(run, receipts),
    }


def baseline(run: Fields, receipts: Receipts, learning_rate: float) -> Fields:
    """Return the fields of the baseline's training at one learning rate."""
    return {
        "recipe": run["baseline_recipe"],
        "architecture": run["student_architecture"],
        "images_processed": run["pretrain_images_processed"],
        "epochs": run["finetune_epochs"],
        "learning_rate": learning_rate,
        "start_weights": run["student_start_weights"],
        **training(run, receipts),
    }


def transfer(run: Fields, receipts: Receipts, weights: str) -> Fields:
    """Return the fields of the training of the verb `transfer` (full-ft)."""
    shared = ("batch_size", "device_batch_size", "weight_decay", "resolution", "augmentation", "frames", "seed")
    return {
        **pick(run, "workdir", "image_column", "label_column", *shared),
        "recipe": "transfer",
        "architecture": run["student_architecture"],
        "plan": receipts.plan,
        "start_weights": weights,
    }


def fc_only(run: Fields, receipts: Receipts, weights: str) -> Fields:
    """Return the fields of the fit of the verb `transfer --setting fc-only`."""
    return {
        **pick(run, "workdir", "image_column", "label_column", "resolution", "augmentation"),
        "architecture": run["student_architecture"],
        "plan": receipts.plan,
        "start_weights": weights,
    }


def count_unscored(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the fan-out of scoring."""
    return {
        "plan": receipts.plan,
        "teacher": receipts.teacher,
        **pick(run, "workdir", "image_column", "decoder"),
    }


def score(run: Fields, receipts: Receipts, pod: int) -> Fields:
    """Return the fields of one scoring pod."""
    return {
        **count_unscored(run, receipts),
        "count": receipts.unscored,
        "pod": pod,
        "images_per_class": run["images_per_class"],
    }


def merge(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the merge."""
    names = ("images_per_class", "classes_per_image", "max_failed_fraction", "remove", "retrain_above")
    return {"plan": receipts.plan, "scores": receipts.scores, **pick(run, "workdir", *names)}


def count_unpacked(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the fan-out of packing."""
    return {
        "plan": receipts.plan,
        "selection": receipts.selection,
        **pick(run, "workdir", "image_column", "packed_tar_bytes", "seed"),
    }


def pack(run: Fields, receipts: Receipts, pod: int) -> Fields:
    """Return the fields of one packing pod."""
    return {**count_unpacked(run, receipts), "count": receipts.unpacked, "pod": pod}


def evaluate(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the evaluation."""
    return {
        "plan": receipts.plan,
        "teacher": receipts.teacher,
        "baselines": receipts.baselines,
        "pretrained": receipts.pretrained,
        "students": receipts.students,
        **pick(run, "workdir", "image_column", "label_column"),
    }


def promote(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the promotion."""
    return {
        "plan": receipts.plan,
        "evaluation": receipts.evaluation,
        **pick(run, "workdir", "image_column", "label_column", "promotion", "champion"),
    }


def report(run: Fields, receipts: Receipts) -> Fields:
    """Return the fields of the report."""
    names = ("plan", "teacher", "baselines", "scores", "selection", "packed", "pretrained", "students")
    given = {name: getattr(receipts, name) for name in (*names, "evaluation", "promotion")}
    return {**given, **pick(run, "workdir", "image_column")}
