"""The Kubeflow component of the plan stage."""

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
