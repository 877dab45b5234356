"""The contracts of the packing: the count of what is left, and the pack stage, one pod of the fan-out."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def count_unpacked(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    selection: dsl.Input[dsl.Artifact],
    image_column: str,
    packed_tar_bytes: int,
    seed: int,
) -> List[int]:
    """Count what is not packed yet of the selection: how many pods the packing keeps busy.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it says how many pods there are at most.
        selection: The merge's receipt.
        image_column: Parquet column of the images.
        packed_tar_bytes: Size of a tar, about.
        seed: Of the order.

    Returns:
        receipt: What was counted, as JSON.
        summary: What was counted, in words.
        Output: The numbers of the pods that share the packing.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.pack.config import PackFanoutConfig
    from semiscale.stages.pack.fanout import plan_pack_fanout as stage

    return list(range(run_in_kfp(PackFanoutConfig, stage, locals()).pods))


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def pack(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    selection: dsl.Input[dsl.Artifact],
    count: dsl.Input[dsl.Artifact],
    pod: int,
    image_column: str,
    packed_tar_bytes: int,
    seed: int,
):
    """Copy the selected images into shuffled WebDataset tars, together with the other pods.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the shards to copy from.
        selection: The merge's receipt.
        count: The receipt of the count of what is left: how many pods there are.
        pod: Which of the pods this is.
        image_column: Parquet column of the images.
        packed_tar_bytes: Size of a tar, about.
        seed: Of the order.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.pack.config import PackConfig
    from semiscale.stages.pack.stage import pack as stage

    run_in_kfp(PackConfig, stage, locals())
