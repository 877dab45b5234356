"""The contracts of the scan: the count of what is left, and the score stage, one pod of the fan-out."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def count_unscored(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    image_column: str,
    decoder: str,
) -> List[int]:
    """Count what this teacher has not scored yet: how many pods the scan keeps busy.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the ledger of the pool.
        teacher: The teacher's receipt.
        image_column: Parquet column of the images.
        decoder: cpu, or gpu: what decodes plain JPEGs.

    Returns:
        receipt: What was counted, as JSON: what the scan reads.
        summary: What was counted, in words.
        Output: The numbers of the pods that share the scan.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.score.config import ScoreFanoutConfig
    from semiscale.stages.score.fanout import plan_score_fanout as stage

    return list(range(run_in_kfp(ScoreFanoutConfig, stage, locals()).pods))


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def score(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    count: dsl.Input[dsl.Artifact],
    pod: int,
    images_per_class: int,
    image_column: str,
    decoder: str,
):
    """Run the teacher over this pod's share of the unlabeled pool and keep every image's best classes.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the ledger of the pool.
        teacher: The teacher's receipt.
        count: The receipt of the count of what is left: how many pods there are.
        pod: Which of the pods this is.
        images_per_class: K: how the score files are laid out for the merge; any other K can still be selected.
        image_column: Parquet column of the images.
        decoder: cpu, or gpu: what decodes plain JPEGs.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.score.config import ScoreConfig
    from semiscale.stages.score.stage import score as stage

    run_in_kfp(ScoreConfig, stage, locals())
