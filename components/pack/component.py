"""The Kubeflow components of the pack stage and of the task that counts its unwritten tars."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def count_unpacked(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    selection: dsl.Input[dsl.Artifact],
) -> List[int]:
    """Count the tars of the selection that are not written yet.

    They decide the number of packing pods.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        selection: The receipt of the merge.

    Returns:
        receipt: The number of packing pods as JSON, for the packing.
        summary: The count in words.
        Output: One number for the pod that follows a Job, or the numbers of the pods that share the packing.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.runtime.pod_count import loop_items
    from semiscale.stages.pack.fanout import PackFanoutConfig
    from semiscale.stages.pack.fanout import plan_pack_fanout as stage

    return loop_items(run_in_kfp(PackFanoutConfig, stage, locals()).receipt)


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def pack(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    count: dsl.Input[dsl.Artifact],
    pod: int,
):
    """Copy the selected images into shuffled WebDataset tars.

    Several pods share the tars. Each pod runs this component.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        count: The receipt of the counting task. It has the number of pods that share the packing.
        pod: The number of this pod, from 0.

    Returns:
        receipt: The packed set as JSON, for the pre-training.
        summary: The packed set in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.pack.stage import PackConfig
    from semiscale.stages.pack.stage import pack as stage

    run_in_kfp(PackConfig, stage, locals())
