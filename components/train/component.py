"""The Kubeflow component of the train stage, which has the four trainings of a run."""

from typing import List

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def train(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    role: str,
    learning_rate: float = -1.0,
    plan: dsl.Input[dsl.Artifact] = None,
    packed: dsl.Input[dsl.Artifact] = None,
    start: dsl.Input[dsl.Artifact] = None,
) -> List[float]:
    """Train one model by a recipe of the paper (section 4.1) and write its checkpoint.

    Args:
        receipt: Artifact that the stage writes its receipt to.
        summary: Page that the stage writes its summary to.
        role: The training, which is teacher, baseline, pretrain or finetune. Receipts call it `recipe`.
        learning_rate: The learning rate for a minibatch of 256 images, in a sweep. -1 takes that of the run.
        plan: The receipt of the plan, for teacher and baseline.
        packed: The receipt of the packed selection, for pretrain.
        start: The receipt of the model to start from, for finetune.

    Returns:
        receipt: The trained model as JSON, for the next stages.
        summary: The trained model in words.
        Output: The learning rates of the fine-tuning.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.train.stage import TrainConfig
    from semiscale.stages.train.stage import train as stage

    return run_in_kfp(TrainConfig, stage, locals()).run.finetune_learning_rates
