"""The contract of the plan stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def plan(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    name: str,
    workdir: str,
    labeled: List[str],
    unlabeled: List[str],
    test: List[str],
    validation: List[str],
    validation_fraction: float,
    classes: str,
    image_column: str,
    label_column: str,
    images_per_class: int,
    classes_per_image: int,
    remove: str,
    packed_tar_bytes: int,
    teacher_architecture: str,
    student_architecture: str,
    teacher_checkpoint: str,
    teacher_classes: str,
    teacher_start_weights: str,
    student_start_weights: str,
    teacher_images_processed: int,
    pretrain_images_processed: int,
    finetune_epochs: int,
    batch_size: int,
    device_batch_size: int,
    teacher_learning_rate: float,
    pretrain_learning_rate: float,
    baseline_learning_rates: List[float],
    finetune_learning_rates: List[float],
    baseline_recipe: str,
    weight_decay: float,
    resolution: int,
    augmentation: str,
    frames: int,
    teacher_frames: int,
    seed: int,
    pods: int,
    decoder: str,
    max_failed_fraction: float,
    budget_hours: float,
    retrain_above: float,
    promotion: str,
    champion: str,
):
    """List and check every input, write the ledger of shards.

    Takes all parameters of the run, so that a bad one is refused here, before a GPU is asked for.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.plan.stage import PlanConfig
    from semiscale.stages.plan.stage import plan as stage

    run_in_kfp(PlanConfig, stage, locals())
