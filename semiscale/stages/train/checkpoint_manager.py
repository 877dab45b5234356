"""Where a training can be taken up again: its state as safetensors, and a JSON, written last, that vouches for it.

A checkpoint is a pair of objects in the training's own folder. The JSON has the size and the digest of the tensors, so
that a pair that was cut short, or torn apart by a store, is recognised and the one before it used. It also names the
training, by the digest that its folder is named by: what somebody copied from another one is refused. Tensors of the
same shapes would else be gone on from by another schedule, and past its end the training would be taken for finished.
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
    """How far a training is, and what it has learnt about itself so far."""

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
    training: str = ""  # not said by those of before it was asked


class CheckpointManager:
    """The checkpoints of one training. One process writes them.

    Cost of each: the tensors once to the disk and once to the store; for the paper's largest network 6.6 GB.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.join(folder, "checkpoints")
        self._training = folder.rstrip("/").rpartition("/")[2]
        self._damaged: set[str] = set()

    def save(self, moment: TrainerProgress, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and forget all but the last two; one that was found damaged is none of the two."""
        # Two processes may be at one training for a moment, when a pod is replaced: neither overwrites the other's.
        name = f"{moment.images_processed:015}-{secrets.token_hex(4)}"
        uri = storage.join(self._folder, f"{name}.safetensors")
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / "checkpoint"
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            with path.open("rb") as file:
                digest = _digest(file)
            storage.upload(path, uri)
            size_bytes = path.stat().st_size
        voucher = _CheckpointManifest(
            moment=moment,
            tensors=f"{name}.safetensors",
            size_bytes=size_bytes,
            digest=digest,
            training=self._training,
        )
        storage.write_bytes(storage.join(self._folder, f"{name}.json"), voucher.model_dump_json().encode())
        self._forget_all_but([uri for uri in self._vouchers() if uri not in self._damaged][:KEEP_LAST])

    def load_latest(self) -> tuple[TrainerProgress, dict[str, Tensor]] | None:
        """Read the newest checkpoint that is whole; None where there is none. Raises InvalidInputError for another
        training's.
        """
        for uri in self._vouchers():
            try:
                return self._read(uri)
            except (ValueError, FileNotFoundError) as error:
                self._damaged.add(uri)
                reason = str(error).splitlines()[0]
                log_info("train", f"{uri}: not a whole checkpoint ({reason}); going on from the one before it")
        return None

    def _vouchers(self) -> list[str]:
        found = [entry.uri for entry in storage.list_objects(self._folder) if entry.uri.endswith(".json")]
        return sorted(found, reverse=True)

    def _read(self, uri: str) -> tuple[TrainerProgress, dict[str, Tensor]]:
        voucher = _CheckpointManifest.model_validate_json(storage.read_bytes(uri))
        if voucher.training not in ("", self._training):
            raise InvalidInputError(
                "SEMI-E241",
                f"{uri}: The checkpoint belongs to training {voucher.training}, and this is {self._training}. Empty "
                f"{self._folder}, or give its model as start_weights.",
            )
        with tempfile.TemporaryDirectory() as here:
            path = Path(here) / "checkpoint"
            with storage.open_object(storage.join(self._folder, voucher.tensors)) as source, path.open("wb") as copy:
                while chunk := source.read(_COPIED_BYTES):
                    copy.write(chunk)
            if path.stat().st_size != voucher.size_bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes of {voucher.size_bytes:,}")
            with path.open("rb") as file:
                if _digest(file) != voucher.digest:
                    raise ValueError("its bytes are not those that were written")
            return voucher.moment, load_file(path)

    def _forget_all_but(self, vouchers: list[str]) -> None:
        """Delete what is older: checkpoints, and tensors whose writer did not live to vouch for them; and the damaged.

        What is newer and not vouched for may be another process's, which is about to.
        """
        oldest = _name(vouchers[-1])
        damaged = {_name(uri) for uri in self._damaged}
        names = {entry.uri: _name(entry.uri) for entry in storage.list_objects(self._folder)}
        old = [uri for uri, name in names.items() if name < oldest or name in damaged]
        for uri in sorted(old, key=lambda uri: not uri.endswith(".json")):  # what has no voucher is no checkpoint
            storage.delete(uri)


def _name(uri: str) -> str:
    return uri.removesuffix(".json").removesuffix(".safetensors")


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
