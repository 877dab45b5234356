"""Save and load the checkpoints that a training resumes from.

A checkpoint is two objects in the training's folder: the tensors as safetensors, and a JSON manifest that is written
last. The manifest has the size and the digest of the tensors. An incomplete pair is therefore recognised, and the
checkpoint before it is loaded.

The manifest also names the training by its digest, which is the name of its folder. A checkpoint that was copied from
another training is refused. If its tensors had the same shapes, they would be resumed with another schedule. A
training past the end of its schedule would count as finished.
"""

import hashlib
import secrets
import tempfile
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.observability.progress import log_info
from semiscale.receipts.train import CurvePoint
from semiscale.storage.documents import StrictDocument

KEEP_LAST = 2
_COPIED_BYTES = 8 << 20


class TrainerProgress(StrictDocument):
    """Progress of a training: its step, its time and its learning curve."""

    step: int
    images_processed: int
    ranks: int
    seconds: float
    curve: list[CurvePoint]


class _CheckpointManifest(StrictDocument):
    """The JSON of a checkpoint."""

    moment: TrainerProgress
    tensors: str
    size_bytes: int
    digest: str
    # Empty in the manifests of older versions.
    training: str = ""


class CheckpointManager:
    """The checkpoints of one training. One process writes them.

    Args:
        folder: URI of the training's folder.

    Cost:
        Each checkpoint writes the tensors once to the disk and once to the store. They are 6.6 GB for the paper's
        largest network.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.join(folder, "checkpoints")
        self._training = folder.rstrip("/").rpartition("/")[2]
        self._damaged: set[str] = set()

    def save(self, moment: TrainerProgress, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and delete all but the last two that are undamaged.

        Args:
            moment: Progress at this checkpoint.
            tensors: State of the training by name.
        """
        # While a pod is replaced, two processes may run one training. The random part keeps their files apart.
        name = f"{moment.images_processed:015}-{secrets.token_hex(4)}"
        uri = storage.join(self._folder, f"{name}.safetensors")
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / "checkpoint"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            with path.open("rb") as file:
                digest = _digest(file)
            storage.upload(path, uri)
            size_bytes = path.stat().st_size
        manifest = _CheckpointManifest(
            moment=moment,
            tensors=f"{name}.safetensors",
            size_bytes=size_bytes,
            digest=digest,
            training=self._training,
        )
        storage.write_bytes(storage.join(self._folder, f"{name}.json"), manifest.model_dump_json().encode())
        self._delete_all_but([uri for uri in self._manifests() if uri not in self._damaged][:KEEP_LAST])

    def load_latest(self) -> tuple[TrainerProgress, dict[str, Tensor]] | None:
        """Return the newest checkpoint that is complete, or None.

        Raises:
            InvalidInputError: The checkpoint is of another training.
        """
        for uri in self._manifests():
            try:
                return self._read(uri)
            except (ValueError, FileNotFoundError) as error:
                self._damaged.add(uri)
                reason = str(error).splitlines()[0]
                log_info("train", f"{uri}: not a whole checkpoint ({reason}); going on from the one before it")
        return None

    def _manifests(self) -> list[str]:
        manifests = [entry.uri for entry in storage.list_objects(self._folder) if entry.uri.endswith(".json")]
        return sorted(manifests, reverse=True)

    def _read(self, uri: str) -> tuple[TrainerProgress, dict[str, Tensor]]:
        manifest = _CheckpointManifest.model_validate_json(storage.read_bytes(uri))
        if manifest.training not in ("", self._training):
            raise InvalidInputError(
                "SEMI-E241",
                f"{uri}: is a checkpoint of training {manifest.training}, but this is {self._training}. "
                f"Empty {self._folder}, or give its model as start_weights.",
            )
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / "checkpoint"
            with storage.open_object(storage.join(self._folder, manifest.tensors)) as source, path.open("wb") as copy:
                while chunk := source.read(_COPIED_BYTES):
                    copy.write(chunk)
            if path.stat().st_size != manifest.size_bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes of {manifest.size_bytes:,}")
            with path.open("rb") as file:
                if _digest(file) != manifest.digest:
                    raise ValueError("its bytes are not those that were written")
            return manifest.moment, load_file(path)

    def _delete_all_but(self, manifests: list[str]) -> None:
        """Delete older checkpoints, older tensors without a manifest, and damaged checkpoints.

        Newer tensors without a manifest are kept, because another process may be about to write it.
        """
        oldest = _name(manifests[-1])
        damaged = {_name(uri) for uri in self._damaged}
        names = {entry.uri: _name(entry.uri) for entry in storage.list_objects(self._folder)}
        old = [uri for uri, name in names.items() if name < oldest or name in damaged]
        # Manifests first: tensors without one are no checkpoint, but a manifest without tensors is damaged.
        for uri in sorted(old, key=lambda uri: not uri.endswith(".json")):
            storage.delete(uri)


def _name(uri: str) -> str:
    return uri.removesuffix(".json").removesuffix(".safetensors")


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
