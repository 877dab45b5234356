"""The contract of the promote stage."""

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def promote(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Artifact],
    promotion: str,
    champion: str,
    image_column: str,
    label_column: str,
):
    """Make the student the champion if it is not worse on the same test images.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the test split and the run.
        evaluation: The evaluation's receipt: it names the student.
        promotion: if-not-worse, or never: the comparison alone.
        champion: Name of the champion; empty: the run's.
        image_column: Parquet column of the images.
        label_column: Parquet column, or key of a .json member, of the labels.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.promote.stage import PromoteConfig
    from semiscale.stages.promote.stage import promote as stage

    run_in_kfp(PromoteConfig, stage, locals())
