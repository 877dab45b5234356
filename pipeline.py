"""Semiscale: the paper's four stages as one Kubeflow pipeline (Yalniz et al. 2019, Figure 1).

    plan ─ teacher ─┬─ score × pods ─ merge ─ pack × pods ─ pretrain ─ finetune × rates ─┬─ evaluate ─ promote ─ report
                    └─ baseline × rates ─────────────────────────────────────────────────┘

`python pipeline.py --help` lists the verbs.
"""

import sys
from typing import List

from kfp import dsl

from components.evaluate.component import evaluate
from components.merge.component import merge
from components.pack.component import count_unpacked, pack
from components.placement import place_on_cpu, place_on_inference_gpu, place_on_training_gpu
from components.plan.component import plan
from components.promote.component import promote
from components.report.component import report
from components.score.component import count_unscored, score
from components.train.component import train


@dsl.pipeline(name="semiscale", description="Billion-scale semi-supervised learning for image classification.")
def semiscale(
    name: str,
    workdir: str,
    labeled: List[str],
    unlabeled: List[str],
    test: List[str],
    validation: List[str] = [],  # noqa: B006 - kfp reads the default, nothing changes it
    validation_fraction: float = 0.1,
    classes: str = "",
    image_column: str = "image",
    label_column: str = "label",
    images_per_class: int = 16_000,
    classes_per_image: int = 10,
    remove: str = "",
    packed_tar_bytes: int = 268_435_456,
    teacher_architecture: str = "resnext101_32x48d",
    student_architecture: str = "resnet50",
    teacher_checkpoint: str = "",
    teacher_classes: str = "",
    teacher_start_weights: str = "",
    student_start_weights: str = "",
    teacher_images_processed: int = 115_000_000,
    pretrain_images_processed: int = 1_000_000_000,
    finetune_epochs: int = 30,
    batch_size: int = -1,
    device_batch_size: int = -1,
    teacher_learning_rate: float = 0.1,
    pretrain_learning_rate: float = 0.1,
    baseline_learning_rates: List[float] = [0.05, 0.1, 0.2],  # noqa: B006
    finetune_learning_rates: List[float] = [0.00025, 0.00075, 0.0025],  # noqa: B006
    baseline_recipe: str = "baseline",
    weight_decay: float = -1,
    resolution: int = 224,
    augmentation: str = "crop-flip",
    frames: int = 0,
    teacher_frames: int = 0,
    seed: int = 0,
    pods: int = 8,
    decoder: str = "cpu",
    max_failed_fraction: float = 0.01,
    budget_hours: float = 0.0,
    retrain_above: float = 0.0,
    promotion: str = "if-not-worse",
    champion: str = "",
):
    """Turn a small labeled set and a huge unlabeled pool into a better classifier at the same inference cost.

    Args:
        name: The run's name: a folder in the workdir.
        workdir: URI of the folder that everything bulky goes under.
        labeled: D: URIs of class folders, WebDataset tars or Parquet files.
        unlabeled: U: the same kinds, or a prefix of loose image files; no labels.
        test: The test set. It chooses nothing and is measured once, at the end.
        validation: Chooses learning rates. Empty: held out from the labeled set.
        validation_fraction: Share of each class held out where no validation set is given.
        classes: URI of a text file, one class name a line: what label 0, 1, … mean.
        image_column: Parquet column of image bytes or of image URIs.
        label_column: Parquet column, or key of a .json member, of the label.
        images_per_class: K: images selected per class (section 4.1).
        classes_per_image: P: classes an image may be ranked in (section 4.1).
        remove: URI of a text file, one key a line: images never to select (opt-outs).
        packed_tar_bytes: Size of D̂'s tars, about. A training reads up to 64 at a time.
        teacher_architecture: The teacher's network, by its name in the README (section 4.1).
        student_architecture: Student's and baseline's network, by its name in the README (section 4.1).
        teacher_checkpoint: URI of a ready-made teacher, checked and used as it is; #sha256=… after it pins its bytes.
        teacher_classes: URI of a text file: what a ready-made teacher's outputs 0, 1, … mean.
        teacher_start_weights: URI of weights the teacher starts from; a head of another size is replaced.
        student_start_weights: URI of weights student and baseline start from; a head of another size is replaced.
        teacher_images_processed: Length of the teacher's training: 90 epochs of ImageNet; not in the paper.
        pretrain_images_processed: The paper's #iter: images the student sees in pre-training (section 4.1).
        finetune_epochs: Length of the fine-tuning (section 4.1).
        batch_size: Global minibatch. -1: each recipe's, 64 x 24 (section 4.1).
        device_batch_size: Images a device forwards and normalises together. -1: each recipe's, 24 (section 4.1).
        teacher_learning_rate: For 256 images; scaled to the minibatch.
        pretrain_learning_rate: For 256 images (section 4.1).
        baseline_learning_rates: For 256 images; chosen on validation, as the student's are.
        finetune_learning_rates: For 256 images; chosen on validation. The paper's is the first (section 4.1).
        baseline_recipe: baseline: as the teacher's; modern: torchvision's newest, with mixup and TrivialAugment.
        weight_decay: -1: each recipe's, 0.0001 (section 4.1).
        resolution: Height and width the models see, in pixels.
        augmentation: crop-flip: random resized crop and mirror; shift-flip, shift: random shift, for tiny images.
        frames: Frames of a clip, where the samples are videos (section 5.1: 8 or 32); 0: images.
        teacher_frames: Frames of the teacher's clips (Table 7: 32); 0: as frames.
        seed: Of initial weights, data order and augmentation.
        pods: At most so many containers share the scan of the unlabeled images, and the packing.
        decoder: What decodes the unlabeled JPEGs: cpu, as in training; gpu: nvJPEG, whose pixels differ slightly.
        max_failed_fraction: Share of unreadable samples in a set above which the run fails.
        budget_hours: Device-hours (GPUs, or pods without) after which the run stops cleanly; 0: no limit.
        retrain_above: Share of the selection that a grown pool must have changed before students are trained again.
        promotion: Whether the student becomes the champion: if-not-worse on the same test images, or never.
        champion: Name of the champion to compete with, in the workdir. Empty: the run's name.
    """
    planned = plan(
        name=name,
        workdir=workdir,
        labeled=labeled,
        unlabeled=unlabeled,
        test=test,
        validation=validation,
        validation_fraction=validation_fraction,
        classes=classes,
        image_column=image_column,
        label_column=label_column,
        images_per_class=images_per_class,
        classes_per_image=classes_per_image,
        remove=remove,
        packed_tar_bytes=packed_tar_bytes,
        teacher_architecture=teacher_architecture,
        student_architecture=student_architecture,
        teacher_checkpoint=teacher_checkpoint,
        teacher_classes=teacher_classes,
        teacher_start_weights=teacher_start_weights,
        student_start_weights=student_start_weights,
        teacher_images_processed=teacher_images_processed,
        pretrain_images_processed=pretrain_images_processed,
        finetune_epochs=finetune_epochs,
        batch_size=batch_size,
        device_batch_size=device_batch_size,
        teacher_learning_rate=teacher_learning_rate,
        pretrain_learning_rate=pretrain_learning_rate,
        baseline_learning_rates=baseline_learning_rates,
        finetune_learning_rates=finetune_learning_rates,
        baseline_recipe=baseline_recipe,
        weight_decay=weight_decay,
        resolution=resolution,
        augmentation=augmentation,
        frames=frames,
        teacher_frames=teacher_frames,
        seed=seed,
        pods=pods,
        decoder=decoder,
        max_failed_fraction=max_failed_fraction,
        budget_hours=budget_hours,
        retrain_above=retrain_above,
        promotion=promotion,
        champion=champion,
    ).set_display_name("Plan: list and check the inputs")
    place_on_cpu(planned)
    # What all stages after the plan are told, and what all trainings are.
    place = {"workdir": workdir, "plan": planned.outputs["receipt"], "image_column": image_column}
    training = {
        **place,
        "label_column": label_column,
        "batch_size": batch_size,
        "device_batch_size": device_batch_size,
        "weight_decay": weight_decay,
        "resolution": resolution,
        "augmentation": augmentation,
        "frames": frames,
        "seed": seed,
    }

    # (1) Train a teacher on the labeled set D.
    teacher = place_on_training_gpu(
        train(
            recipe="teacher",
            architecture=teacher_architecture,
            images_processed=teacher_images_processed,
            learning_rate=teacher_learning_rate,
            own_frames=teacher_frames,
            start_weights=teacher_start_weights,
            checkpoint=teacher_checkpoint,
            checkpoint_classes=teacher_classes,
            **training,
        )
    ).set_display_name("1 Train the teacher on D")

    # (2) Run it on the unlabeled pool U, keep the top K images of every class: D̂. No pod returns before the whole pool
    # has scores: it takes over what dead ones held, and is started again when it dies itself. A task after the loop to
    # mop up would gain nothing: whatever collects the loop's receipts fails with the loop. How many pods there are is
    # counted here: the plan does not know the teacher yet, nor what it has scored.
    scan = {"teacher": teacher.outputs["receipt"], "decoder": decoder, **place}
    unscored = place_on_cpu(count_unscored(**scan)).set_display_name("2 Count what is left to score")
    with dsl.ParallelFor(unscored.outputs["Output"], name="2 Score U, on every pod") as pod:
        scored = place_on_inference_gpu(
            score(pod=pod, count=unscored.outputs["receipt"], images_per_class=images_per_class, **scan)
        ).set_display_name("2 Score U")
    selected = place_on_cpu(
        merge(
            workdir=workdir,
            plan=planned.outputs["receipt"],
            scores=dsl.Collected(scored.outputs["receipt"]),
            images_per_class=images_per_class,
            classes_per_image=classes_per_image,
            max_failed_fraction=max_failed_fraction,
            remove=remove,
            retrain_above=retrain_above,
        )
    ).set_display_name("2 Merge: top K per class")
    packing = {"selection": selected.outputs["receipt"], "packed_tar_bytes": packed_tar_bytes, "seed": seed, **place}
    unpacked = place_on_cpu(count_unpacked(**packing)).set_display_name("2 Count what is left to pack")
    packing = {"count": unpacked.outputs["receipt"], **packing}
    with dsl.ParallelFor(unpacked.outputs["Output"], name="2 Pack D̂, on every pod") as pod:
        pods = place_on_cpu(pack(pod=pod, **packing)).set_display_name("2 Pack D̂")
    # One more, which finds all tars there, hands them on as one.
    packed = place_on_cpu(pack(pod=0, **packing)).after(pods).set_display_name("2 D̂, packed")

    # (3) Train the student on D̂, long.
    pretrained = place_on_training_gpu(
        train(
            recipe="pretrain",
            architecture=student_architecture,
            images_processed=pretrain_images_processed,
            learning_rate=pretrain_learning_rate,
            packed=packed.outputs["receipt"],
            start_weights=student_start_weights,
            **training,
        )
    ).set_display_name("3 Pre-train the student on D̂")

    # (4) Fine-tune it on D, true labels only.
    with dsl.ParallelFor(finetune_learning_rates, name="4 Fine-tune at every learning rate") as learning_rate:
        student = place_on_training_gpu(
            train(
                recipe="finetune",
                architecture=student_architecture,
                epochs=finetune_epochs,
                learning_rate=learning_rate,
                start=pretrained.outputs["receipt"],
                **training,
            )
        ).set_display_name("4 Fine-tune the student on D")

    # What the student is compared with: the same network, on D alone, for as many images.
    with dsl.ParallelFor(baseline_learning_rates, name="Train the baseline at every learning rate") as learning_rate:
        baseline = place_on_training_gpu(
            train(
                recipe=baseline_recipe,
                architecture=student_architecture,
                images_processed=pretrain_images_processed,
                epochs=finetune_epochs,
                learning_rate=learning_rate,
                start_weights=student_start_weights,
                **training,
            )
        ).set_display_name("Train the baseline on D")

    # kfp rewrites a Collected where it is used, so that each use needs its own.
    evaluated = place_on_inference_gpu(
        evaluate(
            teacher=teacher.outputs["receipt"],
            baselines=dsl.Collected(baseline.outputs["receipt"]),
            pretrained=pretrained.outputs["receipt"],
            students=dsl.Collected(student.outputs["receipt"]),
            label_column=label_column,
            **place,
        )
    ).set_display_name("Evaluate on the test set")
    promoted = place_on_inference_gpu(
        promote(
            evaluation=evaluated.outputs["receipt"],
            promotion=promotion,
            champion=champion,
            label_column=label_column,
            **place,
        )
    ).set_display_name("Promote the student if it is not worse")
    place_on_cpu(
        report(
            teacher=teacher.outputs["receipt"],
            baselines=dsl.Collected(baseline.outputs["receipt"]),
            scores=dsl.Collected(scored.outputs["receipt"]),
            selection=selected.outputs["receipt"],
            packed=packed.outputs["receipt"],
            pretrained=pretrained.outputs["receipt"],
            students=dsl.Collected(student.outputs["receipt"]),
            evaluation=evaluated.outputs["receipt"],
            promotion=promoted.outputs["receipt"],
            **place,
        )
    ).set_display_name("Report")


if __name__ == "__main__":
    from semiscale.cli.main import main

    sys.exit(main(semiscale, sys.argv[1:]))
