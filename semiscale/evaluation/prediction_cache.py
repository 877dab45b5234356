"""Store predictions, so that later comparisons need no forward pass."""

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

# Best classes that are stored for each image.
TOP_K = 5


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model on the images of a split, in the split's order.

    Cost: about 40 bytes an image in the stored Parquet file.

    Attributes:
        keys: Keys of the images.
        labels_B: True classes.
        top_BR: At most TOP_K best classes, best first.
        probability_B: Probability of the best class.
    """

    keys: list[str]
    labels_B: Labels
    top_BR: Labels
    probability_B: NDArray[np.float32]

    def correct(self, top: int = 1) -> Bools:
        """Return for every image whether its label is among its `top` best classes."""
        return metrics.topk_correct(self.top_BR, self.labels_B, top)

    def to_bytes(self) -> bytes:
        """Serialize the predictions to a Parquet file."""
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
        """Read the predictions from a Parquet file."""
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
        top = table["top"].combine_chunks()
        return cls(
            keys=table["key"].to_pylist(),
            labels_B=table["label"].to_numpy(),
            top_BR=top.flatten().to_numpy().reshape(-1, top.type.list_size),
            probability_B=table["probability"].to_numpy(),
        )


class SplitEvaluator:
    """Evaluate models on a labeled split.

    A model with stored predictions needs no forward pass.

    Progress counts the images of every model, also of one with stored predictions.

    Args:
        workdir: URI of the workdir.
        split: Labeled split.
        columns: Columns of images and labels.
        progress: Progress of the stage.
    """

    def __init__(self, workdir: str, split: LabeledSplit, columns: SampleFields, progress: Progress) -> None:
        self._workdir, self._split, self._columns, self._progress = workdir, split, columns, progress
        self._loader: EvalLoader | None = None

    def predictions_uri(self, model: TrainReceipt) -> str:
        """Return the URI of a model's predictions."""
        name = content_digest(model.digest, self._split.digest, self._columns.image)
        return storage.join(self._workdir, "stages", "evaluate", "predictions", f"{name}.parquet")

    def predict(self, model: TrainReceipt) -> Predictions:
        """Return the stored predictions of a model, or compute and store them."""
        uri = self.predictions_uri(model)
        stored = storage.read_or_none(uri)
        if stored is not None:
            self._progress.update(self._split.samples)
            return Predictions.from_bytes(stored)
        predictions = self._compute_predictions(model)
        storage.write_bytes(uri, predictions.to_bytes())
        return predictions

    @cached_property
    def _index(self) -> pa.Table:
        table = pq.read_table(io.BytesIO(storage.read_bytes(self._split.index)))
        return table.sort_by([("shard", "ascending"), ("index", "ascending")])

    def _compute_predictions(self, receipt: TrainReceipt) -> Predictions:
        # torch takes seconds to import, and stored predictions do not need it.
        import torch

        from semiscale.evaluation.inference import predict_logits
        from semiscale.models import checkpoint_io

        checkpoint_io.configure_torch()
        device = checkpoint_io.default_device()
        model = checkpoint_io.load_model(receipt.checkpoint)[0].to(device)
        with self._progress.timer("prepare"):
            loader = self._load_split(receipt)
        # The time includes decoding if the split is too large for the cache.
        with self._progress.timer("forward"):
            probability_BC = torch.softmax(predict_logits(model, loader, device, self._progress.update), 1)
        best = probability_BC.topk(min(TOP_K, probability_BC.shape[1]))
        return Predictions(
            keys=self._index["key"].to_pylist(),
            labels_B=self._index["label"].to_numpy(),
            top_BR=best.indices.numpy().astype(np.int32),
            probability_B=best.values[:, 0].numpy(),
        )

    def _load_split(self, receipt: TrainReceipt) -> "EvalLoader":
        """Return a loader, which the next model reuses if its preprocessing is equal."""
        from semiscale.evaluation.inference import EvalLoader

        if self._loader is None or self._loader.preprocessing != receipt.preprocessing:
            # Free the cached images of the last loader before the next one decodes its own.
            self._loader = None
            self._loader = EvalLoader(self._split, self._columns, receipt.preprocessing)
        return self._loader
