"""The Kubeflow component of the report stage."""

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def report(
    receipt: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    promotion: dsl.Input[dsl.Artifact],
):
    """Write the report of the run as a self-contained page, and its numbers as JSON.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        page: Page that the report is copied to.
        promotion: The receipt of the promote stage. It leads to all earlier receipts.

    Returns:
        receipt: The URIs of the page and of the numbers, as JSON.
        page: The report.
    """
    from pathlib import Path

    from semiscale import storage
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.report.stage import ReportConfig
    from semiscale.stages.report.stage import report as stage

    written = run_in_kfp(ReportConfig, stage, locals()).receipt
    Path(page.path).write_bytes(storage.read_bytes(written.report))
