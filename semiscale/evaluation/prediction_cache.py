"""What a model says of every image of a labeled split, kept, so that a later comparison need not run it again."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.data.labeled import LabeledSplit
from semiscale.data.shard import SampleFields
from semiscale.evaluation import metrics
from semiscale.evaluation.metrics import Bools, Labels
from semiscale.observability.progress import Progress
from semiscale.receipts.train import TrainReceipt
from semiscale.storage.parquet import encode_parquet

if TYPE_CHECKING:
    from semiscale.evaluation.inference import EvalLoader

TOP_K = 5  # classes kept of each image, best first


@dataclass(frozen=True)
class Predictions:
    """One model on the images of a split, in the split's order: the TOP best classes and the first one's probability.

    Kept as a Parquet file: about 40 bytes an image.
    """

    keys: list[str]
    labels_B: Labels
    top_BR: Labels
    probability_B: NDArray[np.float32]

    def correct(self, top: int = 1) -> Bools:
        """Say for every image whether its label is among the `top` best classes."""
        return metrics.topk_correct(self.top_BR, self.labels_B, top)

    def to_bytes(self) -> bytes:
        """Return the Parquet file."""
        ranks = self.top_BR.shape[1]
        columns = {
            "key": pa.array(self.keys, pa.string()),
            "label": self.labels_B,
            "top": pa.FixedSizeListArray.from_arrays(pa.array(self.top_BR.ravel()), ranks),
            "probability": self.probability_B,
        }
        return encode_parquet(pa.table(columns), compression="zstd")

    @classmethod
    def from_bytes(cls, data: bytes) -> "Predictions":
        """Read the Parquet file."""
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
        top = table["top"].combine_chunks()
        return cls(
            keys=table["key"].to_pylist(),
            labels_B=table["label"].to_numpy(),
            top_BR=top.flatten().to_numpy().reshape(-1, top.type.list_size),
            probability_B=table["probability"].to_numpy(),
        )


class SplitEvaluator:
    """A labeled split that models are measured on. Only a model that was never measured on it costs a forward pass.

    Its images count for every model, also where they were measured before.
    """

    def __init__(self, workdir: str, split: LabeledSplit, columns: SampleFields, progress: Progress) -> None:
        self._workdir, self._split, self._columns, self._progress = workdir, split, columns, progress
        self._held: EvalLoader | None = None

    def predictions_uri(self, model: TrainReceipt) -> str:
        """Return where a model's predictions are kept."""
        name = content_digest(model.digest, self._split.digest, self._columns.image)
        return storage.join(self._workdir, "stages", "evaluate", "predictions", f"{name}.parquet")

    def predict(self, model: TrainReceipt) -> Predictions:
        """Return a model's predictions: those that are kept, or fresh ones, which are then kept."""
        uri = self.predictions_uri(model)
        kept = storage.read_or_none(uri)
        if kept is not None:
            self._progress.update(self._split.samples)
            return Predictions.from_bytes(kept)
        fresh = self._predicted(model)
        storage.write_bytes(uri, fresh.to_bytes())
        return fresh

    @cached_property
    def _index(self) -> pa.Table:
        table = pq.read_table(io.BytesIO(storage.read_bytes(self._split.index)))
        return table.sort_by([("shard", "ascending"), ("index", "ascending")])

    def _predicted(self, receipt: TrainReceipt) -> Predictions:
        # torch takes seconds to import; predictions that are kept are found without.
        import torch

        from semiscale.evaluation.inference import predict_logits
        from semiscale.models import checkpoint_io

        checkpoint_io.configure_torch()
        device = checkpoint_io.default_device()
        model = checkpoint_io.load_model(receipt.checkpoint)[0].to(device)
        with self._progress.timer("prepare"):
            prepared = self._prepared(receipt)
        with self._progress.timer("forward"):  # of a large split with the decoding of its images
            probability_BC = torch.softmax(predict_logits(model, prepared, device, self._progress.update), 1)
        best = probability_BC.topk(min(TOP_K, probability_BC.shape[1]))
        return Predictions(
            keys=self._index["key"].to_pylist(),
            labels_B=self._index["label"].to_numpy(),
            top_BR=best.indices.numpy().astype(np.int32),
            probability_B=best.values[:, 0].numpy(),
        )

    def _prepared(self, receipt: TrainReceipt) -> "EvalLoader":
        """Return the images as this model sees them; those of the last model are held for the next."""
        from semiscale.evaluation.inference import EvalLoader

        if self._held is None or self._held.preprocessing != receipt.preprocessing:
            self._held = None  # before the next is read: one at a time is held
            self._held = EvalLoader(self._split, self._columns, receipt.preprocessing)
        return self._held
