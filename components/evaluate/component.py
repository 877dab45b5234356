"""The contract of the evaluate stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def evaluate(
    receipt: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    plan: dsl.Input[dsl.Artifact],
    teacher: dsl.Input[dsl.Artifact],
    baselines: dsl.Input[List[dsl.Artifact]],
    pretrained: dsl.Input[dsl.Artifact],
    students: dsl.Input[List[dsl.Artifact]],
    image_column: str,
    label_column: str,
):
    """Choose baseline and student on validation, and measure the four models on the test set, once.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        plan: The plan's receipt: it names the test split.
        teacher: The teacher's receipt.
        baselines: The receipts of the baseline at every learning rate.
        pretrained: The receipt of the student before fine-tuning.
        students: The receipts of the fine-tuned student at every learning rate.
        image_column: Parquet column of the images.
        label_column: Parquet column, or key of a .json member, of the labels.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        metrics: Accuracies in percent, calibration errors, the gain over the baseline.
        confusion: What the student takes the images of each class for.
        summary: What was done, in words.
    """
    from semiscale.receipts.markdown import evaluation_scalars
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.evaluate.config import EvaluateConfig
    from semiscale.stages.evaluate.stage import evaluate as stage

    done = run_in_kfp(EvaluateConfig, stage, locals())
    for name, value in evaluation_scalars(done).items():
        metrics.log_metric(name, value)
    confusion.log_confusion_matrix(done.confusion.classes, done.confusion.counts)
