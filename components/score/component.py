"""The Kubeflow components of the score stage and of the task that counts its unscored shards."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def count_unscored(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    teacher: dsl.Input[dsl.Artifact],
) -> List[int]:
    """Count the shards that this teacher has not scored yet.

    They decide the number of scoring pods.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        teacher: The receipt of the teacher.

    Returns:
        receipt: The number of scoring pods as JSON, for the scan.
        summary: The count in words.
        Output: One number for the pod that follows a Job, or the numbers of the pods that share the scan.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.runtime.pod_count import loop_items
    from semiscale.stages.score.fanout import ScoreFanoutConfig
    from semiscale.stages.score.fanout import plan_score_fanout as stage

    return loop_items(run_in_kfp(ScoreFanoutConfig, stage, locals()).receipt)


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def score(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    count: dsl.Input[dsl.Artifact],
    pod: int,
):
    """Score the unlabeled pool and keep the best classes of each image (section 3.2).

    Several pods share the pool. Each pod runs this component.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        count: The receipt of the counting task. It has the number of pods that share the scan.
        pod: The number of this pod, from 0.

    Returns:
        receipt: The scored shards as JSON, for the merge.
        summary: The scored shards in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.score.stage import ScoreConfig
    from semiscale.stages.score.stage import score as stage

    run_in_kfp(ScoreConfig, stage, locals())
