"""Compact a shard group: rank the stored scores of its shards.

A group with many images is ranked in pieces, so that memory is bounded.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from semiscale import storage
from semiscale.common.digest import content_digest
from semiscale.common.prefetch import map_prefetched
from semiscale.data.shard import Shard, ShardGroup
from semiscale.receipts.score import ShardGroupReceipt
from semiscale.scores import score_file
from semiscale.scores.score_file import MAX_IMAGES_PER_RANKING
from semiscale.stages.score import shard_scores
from semiscale.stages.score.score_store import MAX_CONCURRENT_READS
from semiscale.stages.score.shard_scores import MAX_FAILURES_LISTED, ShardScores
from semiscale.stages.score.timings import add_write_seconds, scan_stats


@dataclass
class RankedPart:
    """A piece of a shard group: the shards that are ranked together.

    Attributes:
        shards: Shards of the piece.
        parts: Scores of each shard.
        images: Number of scored images.
        began: Time of the monotonic clock at which reading began.
    """

    shards: list[Shard] = field(default_factory=list)
    parts: list[ShardScores] = field(default_factory=list)
    images: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, shard: Shard, scores: ShardScores) -> None:
        """Add a shard and its scores."""
        self.shards.append(shard)
        self.parts.append(scores)
        self.images += scores.count.scored


@dataclass(frozen=True)
class GroupCompactor:
    """Compacts shard groups of one score folder.

    Attributes:
        folder: URI of the score folder.
        teacher: Digest of the teacher.
        pod: Number of this pod.
        images_per_class: K, which sets the size of the first band.
        num_groups: Number of shard groups in the pool.
        classes: Number of the teacher's classes.
        heartbeat: Keeps the pod's leases alive. It is called at every read and write.

    Cost:
        Memory of MAX_IMAGES_PER_RANKING images at ten classes each, and of MAX_CONCURRENT_READS encoded shard scores at
        60 bytes an image. That is 10 GB, measured with a group of 24 million images in shards of 200,000, which is two
        pieces. A single shard with more images is ranked whole. It can only be a tar, of which the plan warns, because
        large Parquet files are split.
    """

    folder: str
    teacher: str
    pod: int
    images_per_class: int
    num_groups: int
    classes: int
    heartbeat: Callable[[], None]

    def compact(self, group: ShardGroup, folder: str) -> dict[str, object]:
        """Write the files of a shard group, or those of its pieces.

        Args:
            group: Shard group whose shards all have scores.
            folder: URI of the group's folder.

        Returns:
            The fields of the group's receipt.

        Raises:
            SemiscaleError: Stored scores are damaged, or belong to another teacher or shard.
        """
        pieces = list(map(partial(self._rank_piece, group, folder), self._read_pieces(group)))
        return dict(pieces[0]) if len(pieces) == 1 else self._merge_receipts(group, folder, pieces)

    def _read_pieces(self, group: ShardGroup) -> Iterator[RankedPart]:
        """Read the scores of a group's shards in order, and yield them in pieces.

        A piece has up to MAX_IMAGES_PER_RANKING images, so most groups are one piece. The order of the shards is that
        of a hash, so no piece collects one kind of image. Pieces are divided by the number of images, so every pod
        divides a group in the same way. A piece is freed before the next one is read.
        """
        uris = [shard_scores.shard_scores_uri(self.folder, shard) for shard in group.shards]
        piece = RankedPart()
        with closing(map_prefetched(storage.read_bytes, uris, MAX_CONCURRENT_READS)) as contents:
            for shard, uri, data in zip(group.shards, uris, contents, strict=True):
                scores = shard_scores.shard_scores_from_parquet(data, uri, self.teacher)
                if scores.count.digest != shard.digest():
                    raise shard_scores.corrupt_scores_error(
                        uri, f"It holds scores of shard {scores.count.shard}, expected those of {shard.name}"
                    )
                self.heartbeat()
                if piece.parts and piece.images + scores.count.scored > MAX_IMAGES_PER_RANKING:
                    yield piece
                    piece = RankedPart()
                piece.add(shard, scores)
        yield piece

    def _rank_piece(self, group: ShardGroup, folder: str, piece: RankedPart) -> ShardGroupReceipt:
        """Rank a piece, write its files, and return its receipt.

        The seconds of compaction are divided among the shards by their images.
        """
        name, num_groups = group.digest, float(self.num_groups)
        if len(piece.shards) < len(group.shards):
            # A piece of several has a name and a folder of its own. It holds a smaller share of each class's best
            # images, so its first band is smaller too.
            name = content_digest([shard.digest() for shard in piece.shards])
            folder = storage.join(folder, name)
            num_groups *= _size_bytes(group.shards) / max(_size_bytes(piece.shards), 1)
        metadata = {"teacher": self.teacher, "unit": name, "shards": [shard.name for shard in piece.shards]}
        head = score_file.first_band_size(self.images_per_class, num_groups)
        files = shard_scores.build_group_files(piece.parts, head, self.classes, metadata)
        uris = {file: storage.join(folder, f"{file}.parquet") for file in files}
        for file, data in files.items():
            self.heartbeat()
            storage.write_bytes(uris[file], data)
        compaction_s = time.monotonic() - piece.began
        counts = [
            add_write_seconds(scores.count, compaction_s * scores.count.scored / max(piece.images, 1))
            for scores in piece.parts
        ]
        return ShardGroupReceipt(
            **uris,
            **scan_stats(counts),
            stage="score",
            digest=name,
            folder=folder,
            seconds=round(sum(scores.seconds for scores in piece.parts) + compaction_s, 3),
            teacher=self.teacher,
            pod=self.pod,
            shards=counts,
            failures=[failure for scores in piece.parts for failure in scores.failures][:MAX_FAILURES_LISTED],
        )

    def _merge_receipts(self, group: ShardGroup, folder: str, pieces: list[ShardGroupReceipt]) -> dict[str, object]:
        """Return the fields of the receipt of a shard group that has several pieces."""
        counts = [count for piece in pieces for count in piece.shards]
        return {
            **dict(pieces[0]),
            **scan_stats(counts),
            **dict.fromkeys(("scores", "places", "samples"), ""),
            "digest": group.digest,
            "folder": folder,
            "seconds": round(sum(piece.seconds for piece in pieces), 3),
            "shards": counts,
            "failures": [failure for piece in pieces for failure in piece.failures][:MAX_FAILURES_LISTED],
            "pieces": pieces,
        }


def _size_bytes(shards: Sequence[Shard]) -> int:
    return sum(shard.size_bytes for shard in shards)
