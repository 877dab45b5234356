"""The Kubeflow component of the evaluate stage."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def evaluate(
    receipt: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    summary: dsl.Output[dsl.Markdown],
    baselines: dsl.Input[List[dsl.Artifact]],
    students: dsl.Input[List[dsl.Artifact]],
):
    """Measure the four models on the test set, once.

    The stage chooses the baseline and the student on the validation set before that.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        metrics: Artifact that accuracies and calibration errors are logged to.
        confusion: Artifact that the confusion matrix of the student is logged to.
        summary: Page that the stage writes its summary to.
        baselines: The receipts of the baseline at every learning rate.
        students: The receipts of the fine-tuned student at every learning rate.

    Returns:
        receipt: The measurements as JSON, for the promotion.
        metrics: Accuracies in percent, calibration errors, and the gain over the baseline.
        confusion: The number of images of each class that the student assigns to each class.
        summary: The measurements in words.
    """
    from semiscale.receipts.markdown import evaluation_scalars
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.evaluate.config import EvaluateConfig
    from semiscale.stages.evaluate.stage import evaluate as stage

    evaluation = run_in_kfp(EvaluateConfig, stage, locals()).receipt
    for name, value in evaluation_scalars(evaluation).items():
        metrics.log_metric(name, value)
    confusion.log_confusion_matrix(evaluation.confusion.classes, evaluation.confusion.counts)
