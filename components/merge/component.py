"""The Kubeflow component of the merge stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def merge(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    scores: dsl.Input[List[dsl.Artifact]],
):
    """Select the exact top K images of every class over the whole pool.

    They are the balanced pseudo-labeled set (section 3.2).

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        scores: The receipts of all scoring pods.

    Returns:
        receipt: The selection as JSON, for the packing.
        summary: The selection in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.merge.stage import MergeConfig
    from semiscale.stages.merge.stage import merge as stage

    run_in_kfp(MergeConfig, stage, locals())
