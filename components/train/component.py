"""The contract of the train stage: one component, many recipes."""

from kfp import dsl

from components import container_images


@dsl.component(base_image=container_images.CUDA_IMAGE, install_kfp_package=False)
def train(
    receipt: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    workdir: str,
    recipe: str,
    architecture: str,
    plan: dsl.Input[dsl.Artifact],
    learning_rate: float,
    batch_size: int,
    device_batch_size: int,
    weight_decay: float,
    resolution: int,
    augmentation: str,
    image_column: str,
    label_column: str,
    seed: int,
    frames: int = 0,
    own_frames: int = 0,
    images_processed: int = 0,
    epochs: int = 0,
    packed: dsl.Input[dsl.Artifact] = None,
    start: dsl.Input[dsl.Artifact] = None,
    start_weights: str = "",
    checkpoint: str = "",
    checkpoint_classes: str = "",
):
    """Train one model by a recipe of the paper (section 4.1) and leave its checkpoint.

    Args:
        workdir: URI of the folder that everything bulky goes under.
        recipe: teacher, baseline, modern, pretrain or finetune; others are listed in semiscale/stages/train/recipes.py.
        architecture: The network, by name.
        plan: The plan's receipt: the classes, the training and the validation split.
        device_batch_size: Images that a device forwards at a time and normalises together; -1 for the recipe's.
        learning_rate: For a minibatch of 256 images; scaled linearly to batch_size.
        batch_size: Global minibatch; -1 for the recipe's.
        weight_decay: Of all parameters; -1 for the recipe's.
        resolution: Height and width that the model sees, in pixels.
        augmentation: How training images are cut.
        image_column: Parquet column of the images.
        label_column: Parquet column, or key of a .json member, of the labels.
        seed: Of initial weights, data order and augmentation.
        frames: Frames of the clips that the run's models see; 0: they see images.
        own_frames: Frames of the clips that this model sees, where not those; 0: as frames.
        images_processed: Images to process, forward and backward (the paper's #iter).
        epochs: Passes over the planned training split, in addition.
        packed: The packed selection's receipt, for pretrain.
        start: The receipt of the model to start from, for finetune.
        start_weights: URI of weights to start from; a head of another size is replaced.
        checkpoint: URI of a ready-made teacher, which is checked and used as it is.
        checkpoint_classes: URI of a text file: what the ready-made teacher's outputs mean.

    Returns:
        receipt: What was done, as JSON: what the next stages read.
        summary: What was done, in words.
    """
    from semiscale.runtime.entrypoints import run_in_kfp
    from semiscale.stages.train.config import TrainConfig
    from semiscale.stages.train.stage import train as stage

    run_in_kfp(TrainConfig, stage, locals())
