"""Train: one stage, many recipes. Teacher and baseline learn from the labeled set, the student is pre-trained on the
packed selection and fine-tuned on the labeled set."""

from components.shared import storage
from components.shared.receipts import TrainReceipt, load
from components.shared.stage import once
from components.shared.stopping import stopping_on_sigterm
from components.train import ranks, trainjob
from components.train.config import HeadConfig, TrainConfig


def train(config: TrainConfig) -> TrainReceipt:
    """Train one model for `images_processed` images plus `epochs` passes over the planned training split, or take a
    ready-made teacher.

    Both may be given: the baseline is trained as long as the student's pre-training and fine-tuning together. On a
    machine with several GPUs one rank is started for each; under torchrun this process is one of the ranks; more than
    one node are a TrainJob's, which this follows. Raises SemiscaleError where the loss stops being a number, Stopped on
    SIGTERM.
    """
    me = ranks.of_environment()

    def work(folder: str) -> dict[str, object]:
        # torch takes seconds to import; finished work is found without it
        if config.checkpoint:
            from components.train import ready_made

            return ready_made.run(config, folder)
        with stopping_on_sigterm() as stopping:
            if not ranks.started_by_torchrun() and (count := ranks.devices()) > 1:
                ranks.start(config, count)
                return load(storage.join(folder, "receipt.json"), TrainReceipt).model_dump()
            from components.train.loop import run

            return run(config, folder, me, stopping)

    if launch := trainjob.asked():
        # And then the work is found finished. A ready-made teacher is checked by one device.
        trainjob.train_on_nodes(config, launch.of_one_device() if config.checkpoint else launch)
    return once(config, TrainReceipt, work, writes=me.first)


def fit_head(config: HeadConfig) -> TrainReceipt:
    """Fit a new head to the planned training split, the rest of a network as it is; its L2 is chosen on validation."""

    def work(folder: str) -> dict[str, object]:
        from components.train import head

        return head.run(config, folder)

    return once(config, TrainReceipt, work)


__all__ = ["HeadConfig", "TrainConfig", "fit_head", "train"]
