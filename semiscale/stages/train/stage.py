"""Train: one stage, many recipes. Teacher and baseline learn from the labeled set, the student is pre-trained on the
packed selection and fine-tuned on the labeled set.
"""

from semiscale import storage
from semiscale.common.signals import graceful_stop
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime.run_once import run_once
from semiscale.stages.train import distributed, trainjob
from semiscale.stages.train.config import LinearProbeConfig, TrainConfig
from semiscale.storage.documents import load_document


def train(config: TrainConfig) -> TrainReceipt:
    """Train one model for `images_processed` images plus `epochs` passes over the planned training split, or take a
    ready-made teacher.

    Both may be given: the baseline is trained as long as the student's pre-training and fine-tuning together. On a
    machine with several GPUs one rank is started for each; under torchrun this process is one of the ranks; more than
    one node are a TrainJob's, which this follows. Raises SemiscaleError where the loss stops being a number, Stopped on
    SIGTERM.
    """
    me = distributed.distributed_context_from_env()

    def work(folder: str) -> dict[str, object]:
        # torch takes seconds to import; finished work is found without it
        if config.checkpoint:
            from semiscale.stages.train import pretrained_teacher

            return pretrained_teacher.import_teacher(config, folder)
        with graceful_stop() as stopping:
            if not distributed.is_under_torchrun() and (count := distributed.local_device_count()) > 1:
                distributed.launch_local_ranks(config, count)
                return load_document(storage.join(folder, "receipt.json"), TrainReceipt).model_dump()
            from semiscale.stages.train.trainer import run_training

            return run_training(config, folder, me, stopping)

    if launch := trainjob.trainjob_settings_from_env():
        # And then the work is found finished. A ready-made teacher is checked by one device.
        trainjob.run_trainjob(config, launch.single_device() if config.checkpoint else launch)
    return run_once(config, TrainReceipt, work, writes=me.is_main)


def fit_linear_probe(config: LinearProbeConfig) -> TrainReceipt:
    """Fit a new head to the planned training split, the rest of a network as it is; its L2 is chosen on validation."""

    def work(folder: str) -> dict[str, object]:
        from semiscale.stages.train import linear_probe

        return linear_probe.fit(config, folder)

    return run_once(config, TrainReceipt, work)


__all__ = ["LinearProbeConfig", "TrainConfig", "fit_linear_probe", "train"]
