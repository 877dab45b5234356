"""Save and load the checkpoints that a training resumes from.

A checkpoint is two objects in the training's folder. The tensors are a safetensors file. A JSON manifest is written
last, with the size and the digest of the tensors. An incomplete pair is therefore recognized, and the checkpoint before
it is loaded.

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

# Undamaged checkpoints that are kept. If the last one turns out to be damaged, the one before it is loaded.
KEEP_LAST = 2
# Bytes that are read from the store at a time.
_CHUNK_BYTES = 8 << 20


class TrainerProgress(StrictDocument):
    """Progress of a training at a checkpoint.

    Attributes:
        step: Number of the last step, from 1.
        images_processed: Images of all steps.
        ranks: Number of ranks that trained.
        seconds: Seconds of training in all processes so far.
        curve: The learning curve.
    """

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
    """Write and read the checkpoints of one training. One process writes them.

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

    def save(self, progress: TrainerProgress, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and delete all but the last KEEP_LAST that are undamaged.

        Args:
            progress: Progress at this checkpoint.
            tensors: State of the training by name.
        """
        # While a pod is replaced, two processes may run one training. The random part keeps their files apart.
        name = f"{progress.images_processed:015}-{secrets.token_hex(4)}"
        uri = storage.join(self._folder, f"{name}.safetensors")
        with tempfile.TemporaryDirectory() as temp_dir:
            path = Path(temp_dir) / "checkpoint"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            with path.open("rb") as file:
                digest = _compute_digest(file)
            storage.upload(path, uri)
            size_bytes = path.stat().st_size
        manifest = _CheckpointManifest(
            moment=progress,
            tensors=f"{name}.safetensors",
            size_bytes=size_bytes,
            digest=digest,
            training=self._training,
        )
        storage.write_bytes(storage.join(self._folder, f"{name}.json"), manifest.model_dump_json().encode())
        self._delete_all_but([uri for uri in self._list_manifests() if uri not in self._damaged][:KEEP_LAST])

    def load_latest(self) -> tuple[TrainerProgress, dict[str, Tensor]] | None:
        """Return the newest checkpoint that is complete, or None.

        Raises:
            InvalidInputError: The checkpoint is of another training.
        """
        for uri in self._list_manifests():
            try:
                return self._read(uri)
            except (ValueError, FileNotFoundError) as error:
                self._damaged.add(uri)
                reason = str(error).splitlines()[0]
                log_info("train", f"{uri}: not a whole checkpoint ({reason}); going on from the one before it")
        return None

    def _list_manifests(self) -> list[str]:
        """Return the URIs of the manifests, the newest first."""
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
        with tempfile.TemporaryDirectory() as temp_dir:
            path = Path(temp_dir) / "checkpoint"
            with storage.open_object(storage.join(self._folder, manifest.tensors)) as source, path.open("wb") as copy:
                while chunk := source.read(_CHUNK_BYTES):
                    copy.write(chunk)
            if path.stat().st_size != manifest.size_bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes of {manifest.size_bytes:,}")
            with path.open("rb") as file:
                if _compute_digest(file) != manifest.digest:
                    raise ValueError("its bytes are not those that were written")
            return manifest.moment, load_file(path)

    def _delete_all_but(self, manifests: list[str]) -> None:
        """Delete older and damaged checkpoints, and older tensors without a manifest.

        Newer tensors without a manifest are kept, because another process may be about to write it.
        """
        oldest = _strip_suffix(manifests[-1])
        damaged = {_strip_suffix(uri) for uri in self._damaged}
        names = {entry.uri: _strip_suffix(entry.uri) for entry in storage.list_objects(self._folder)}
        old = [uri for uri, name in names.items() if name < oldest or name in damaged]
        # Manifests are deleted first. Tensors without a manifest are no checkpoint, but a manifest without tensors is a
        # damaged one.
        for uri in sorted(old, key=lambda uri: not uri.endswith(".json")):
            storage.delete(uri)


def _strip_suffix(uri: str) -> str:
    """Return the URI without suffix, which is that of both objects of a checkpoint."""
    return uri.removesuffix(".json").removesuffix(".safetensors")


def _compute_digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
