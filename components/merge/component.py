"""The contract of the merge stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def merge(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    scores: dsl.Input[List[dsl.Artifact]],
    images_per_class: int,
    classes_per_image: int,
    max_failed_fraction: float,
    remove: str,
    retrain_above: float,
):
    """Select the exact top K images of every class over the whole pool: the balanced pseudo-labeled set.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: every unit in its ledger must have scores.
        scores: The receipts of all scoring pods.
        images_per_class: K.
        classes_per_image: P.
        remove: URI of a text file of keys that may not be selected, or nothing.
        max_failed_fraction: Share of unreadable images above which the run fails.
        retrain_above: Share of the selection that must have changed for it to replace the run's earlier one.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.merge.stage import MergeConfig
    from semiscale.stages.merge.stage import merge as stage

    run_in_kfp(MergeConfig, stage, locals())
