"""The contract of the report stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CPU_IMAGE, install_kfp_package=False)
def report(
    receipt: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    baselines: dsl.Input[List[dsl.Artifact]],
    scores: dsl.Input[List[dsl.Artifact]],
    selection: dsl.Input[dsl.Artifact],
    packed: dsl.Input[dsl.Artifact],
    pretrained: dsl.Input[dsl.Artifact],
    students: dsl.Input[List[dsl.Artifact]],
    evaluation: dsl.Input[dsl.Artifact],
    promotion: dsl.Input[dsl.Artifact],
    image_column: str,
):
    """Write the run's report, one self-contained page, and its numbers as JSON.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt.
        teacher: The teacher's receipt.
        baselines: The receipts of the baseline at every learning rate.
        scores: The receipts of all scoring pods.
        selection: The merge's receipt.
        packed: The pack stage's receipt.
        pretrained: The receipt of the student before fine-tuning.
        students: The receipts of the fine-tuned student at every learning rate.
        evaluation: The evaluation's receipt.
        promotion: The promote stage's receipt.
        image_column: Parquet column of the images that the gallery shows.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        page: The report.
    """
    from pathlib import Path

    from semiscale import storage
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.report.stage import ReportConfig
    from semiscale.stages.report.stage import report as stage

    done = run_in_kfp(ReportConfig, stage, locals())
    Path(page.path).write_bytes(storage.read_bytes(done.report))
