"""The Kubeflow component of the promote stage."""

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def promote(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    evaluation: dsl.Input[dsl.Artifact],
):
    """Make the student the champion if it is not worse on the same test images.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        evaluation: The receipt of the evaluation. It names the student.

    Returns:
        receipt: The decision as JSON, for the report.
        summary: The decision in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.promote.stage import PromoteConfig
    from semiscale.stages.promote.stage import promote as stage

    run_in_kfp(PromoteConfig, stage, locals())
