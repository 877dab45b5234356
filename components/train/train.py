"""Train: one stage, four recipes. Teacher and baseline learn from the labeled set, the student is pre-trained on the
packed selection and fine-tuned on the labeled set."""

from components.shared.receipts import TrainReceipt
from components.shared.stage import once
from components.train import trainjob
from components.train.config import TrainConfig


def train(config: TrainConfig) -> TrainReceipt:
    """Train one model for `images_processed` images plus `epochs` passes over the planned training split, or take a
    ready-made teacher.

    Both may be given: the baseline is trained as long as the student's pre-training and fine-tuning together. Raises
    SemiscaleError where the loss stops being a number. More than one node are a TrainJob's, which this follows.
    """

    def work(folder: str) -> dict[str, object]:
        # torch takes seconds to import; finished work is found without it
        if config.checkpoint:
            from components.train.ready_made import run
        else:
            from components.train.loop import run
        return run(config, folder)

    if launch := trainjob.asked():
        trainjob.train_on_nodes(config, launch)  # and then the work is found finished
    return once(config, TrainReceipt, work)


__all__ = ["TrainConfig", "train"]
