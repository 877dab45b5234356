"""The train stage.

The teacher and the baseline learn from the labeled set. The student is pre-trained on the packed selection and
fine-tuned on the labeled set. A recipe has the numbers of each training.
"""

import contextlib

from semiscale import storage
from semiscale.common.signals import graceful_stop
from semiscale.config.resources import TrainJobSettings
from semiscale.receipts.train import TrainReceipt
from semiscale.runtime import follower
from semiscale.runtime.run_once import run_once
from semiscale.stages.train import distributed, trainjob
from semiscale.stages.train.config import LinearProbeConfig, TrainConfig
from semiscale.stages.train.distributed import DistributedContext
from semiscale.storage.documents import load_document


def train(config: TrainConfig) -> TrainReceipt:
    """Train one model, or import a ready-made teacher.

    The training processes `images_processed` images plus `epochs` passes over the planned training split. Both may be
    given. The baseline is trained as long as the student's pre-training and fine-tuning together.

    On a machine with several GPUs, this process starts one rank for each GPU. Under torchrun this process is one of the
    ranks. A training on several nodes is a TrainJob, which this process starts and follows.

    Args:
        config: The training.

    Returns:
        The receipt.

    Raises:
        InvalidInputError: The inputs do not fit together.
        SemiscaleError: The training failed, for example because its loss is not finite.
        TerminatedError: SIGTERM stopped the training.
    """
    me = distributed.distributed_context_from_env()

    def work(folder: str) -> dict[str, object]:
        # The import of torch takes seconds. It stands here because finished work does not need it.
        if config.checkpoint:
            from semiscale.stages.train import pretrained_teacher

            return pretrained_teacher.import_teacher(config, folder)
        with graceful_stop() as stopping, _abandonment_watch(config, folder, me):
            if not distributed.is_under_torchrun() and (count := distributed.local_device_count()) > 1:
                distributed.launch_local_ranks(config, count)
                return load_document(storage.join(folder, "receipt.json"), TrainReceipt).model_dump()
            from semiscale.stages.train.trainer import run_training

            return run_training(config, folder, me, stopping)

    if launch := TrainJobSettings.from_env():
        # The TrainJob writes the receipt, which `run_once` then finds. One device is enough to check a teacher.
        trainjob.run_trainjob(config, launch.single_device() if config.checkpoint else launch)
    return run_once(config, TrainReceipt, work, writes=me.is_main)


def _abandonment_watch(
    config: TrainConfig, folder: str, me: DistributedContext
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which rank 0 of a TrainJob stops all ranks if the run has ended."""
    if not me.is_main:
        return contextlib.nullcontext()
    return follower.stop_when_abandoned(folder, config, config.plan, "TrainJob")


def fit_linear_probe(config: LinearProbeConfig) -> TrainReceipt:
    """Fit a new head to the planned training split and leave the rest of the network as it is.

    The strength of L2 is chosen on the validation split.

    Args:
        config: The network and the data.

    Returns:
        The receipt.

    Raises:
        InvalidInputError: The weights do not fit the architecture.
        SemiscaleError: The features of the network are not finite.
    """

    def work(folder: str) -> dict[str, object]:
        from semiscale.stages.train import linear_probe

        return linear_probe.fit(config, folder)

    return run_once(config, TrainReceipt, work)


__all__ = ["LinearProbeConfig", "TrainConfig", "fit_linear_probe", "train"]
