"""The contract of the plan stage."""

from typing import Dict, List

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
    teacher_architecture: str,
    student_architecture: str,
    images_per_class: int,
    classes_per_image: int,
    teacher_images_processed: int,
    pretrain_images_processed: int,
    finetune_epochs: int,
    seed: int,
    pods: int,
    settings: Dict,  # type: ignore[type-arg]
) -> List[float]:
    """List and check every input, and write the list of the pool's shards.

    The stage takes all parameters of the run, so that it can refuse wrong ones before a GPU is used.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        name: The run's name: a folder in the workdir.
        workdir: URI of the folder that everything bulky goes under.
        labeled: D: URIs of class folders, WebDataset tars or Parquet files.
        unlabeled: U: the same kinds, or a prefix of loose image files; no labels.
        test: The test set. It is measured at the end, and decides on promotion alone.
        validation: The set that chooses learning rates. Empty: held out from the labeled set.
        teacher_architecture: The teacher's network; the documentation lists the names.
        student_architecture: The network of student and baseline; the documentation lists the names.
        images_per_class: K: images selected per class.
        classes_per_image: P: number of classes that an image may be ranked in.
        teacher_images_processed: Length of the teacher's training. The default is 90 epochs of ImageNet; the paper
            states none.
        pretrain_images_processed: The paper's #iter: number of images that the student processes in pre-training.
        finetune_epochs: Length of the fine-tuning, in passes over the labeled set.
        seed: Seed of initial weights, data order and augmentation.
        pods: Largest number of containers that share the scan, and the packing.
        settings: All other keys of a run file.

    Returns:
        receipt: The inputs as JSON, with all parameters of the run.
        summary: The inputs in words.
        Output: The learning rates of the baseline.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.plan.stage import PlanConfig
    from semiscale.stages.plan.stage import plan as stage

    return run_in_kfp(PlanConfig, stage, locals()).run.baseline_learning_rates
