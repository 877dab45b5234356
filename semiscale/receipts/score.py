"""Define the receipts of scoring."""

from pydantic import Field

from semiscale.common.errors import SemiscaleError
from semiscale.receipts.base import BadSample, Receipt
from semiscale.storage.documents import StrictDocument


class PartSeconds(StrictDocument):
    """Time of each part of scoring, in thread-seconds.

    Many threads decode, so the largest value need not be the bottleneck. The field `slowest` of a receipt names the
    bottleneck.

    Attributes:
        read: Reading samples from the store.
        decode: Decoding images.
        forward: Forward passes.
        write: Encoding scores, and the shard's share of writing the files of its shard group. The upload of the shard's
            own scores is not included, because the uploaded file contains these clocks. The log includes it.
    """

    read: float = 0.0
    decode: float = 0.0
    forward: float = 0.0
    write: float = 0.0


class PartImageCounts(StrictDocument):
    """Number of images that each part of scoring processed.

    An image without bytes is not decoded. A damaged image is not forwarded. An image whose scores are not finite is not
    written.
    """

    read: int = 0
    decode: int = 0
    forward: int = 0
    write: int = 0


class ShardAccounting(StrictDocument):
    """Accounting of one shard's samples: listed = scored + failed.

    The reader counts `listed`, and the writer counts the others. A sample that is lost in between breaks the equation.

    Attributes:
        shard: Name of the shard.
        digest: Digest of the shard.
        listed: Number of samples that were read.
        scored: Number of samples that have scores.
        failed: Number of failed samples by reason.
        clocks: Time of each part.
        images: Number of images of each part.
    """

    shard: str
    digest: str
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: PartSeconds = PartSeconds()
    images: PartImageCounts = PartImageCounts()

    def check_complete(self) -> None:
        """Check that every listed sample is scored or failed.

        Raises:
            SemiscaleError: A sample is lost (SEMI-E179).
        """
        if self.listed != self.scored + sum(self.failed.values()):
            raise SemiscaleError(
                "SEMI-E179",
                f"shard {self.shard}: {self.listed} samples were listed, but {self.scored} scored and "
                f"{sum(self.failed.values())} failed. Score the shard again.",
            )


class ShardGroupReceipt(Receipt):
    """Receipt of the scores of one shard group.

    A shard group may have more images than can be ranked at once. Then it has `pieces` instead of files. Each piece has
    some of the shards and its own files, like a shard group. The counts of the group are the sums over its pieces.

    Attributes:
        teacher: Digest of the training of the teacher.
        pod: Number of the pod that wrote the receipt.
        scores: URI of the Parquet file of the scores (see semiscale/scores/score_file.py).
        places: URI of the Parquet file of the samples of the first bands (see semiscale/scores/sample_locations.py).
        samples: URI of the Parquet file of all samples.
        shards: Accounting of each shard.
        failures: Some of the failed samples.
        clocks: Time of each part.
        images: Number of images of each part.
        slowest: Part that the others waited for, or "" if nothing was scored.
        pieces: Receipts of the pieces.
    """

    teacher: str
    pod: int
    scores: str
    places: str
    samples: str
    shards: list[ShardAccounting]
    failures: list[BadSample]
    clocks: PartSeconds
    images: PartImageCounts = PartImageCounts()
    slowest: str = ""
    pieces: list["ShardGroupReceipt"] = Field(default=[])

    @property
    def scored(self) -> int:
        """Number of images that have scores."""
        return sum(shard.scored for shard in self.shards)


class ScoreReceipt(Receipt):
    """Receipt of one scoring pod.

    Attributes:
        pod: Number of the pod.
        teacher: Digest of the training of the teacher.
        units: Number of shard groups that count for the pod. Together the pods count every group once.
        units_found: Number of these that were already finished.
        listed: Number of samples in these shard groups.
        scored: Number of samples that have scores.
        failed: Number of failed samples by reason.
        clocks: Time of each part.
        images: Number of images of each part.
        slowest: Part that the others waited for, or "" if nothing was scored.
    """

    pod: int
    teacher: str
    units: int
    units_found: int
    listed: int
    scored: int
    failed: dict[str, int]
    clocks: PartSeconds
    images: PartImageCounts = PartImageCounts()
    slowest: str = ""
