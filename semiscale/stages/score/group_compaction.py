"""Seal: put a unit's parts together, its rows ranked, in as many pieces as keep a pod's memory bounded."""

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
from semiscale.stages.score.shard_scores import ShardScores
from semiscale.stages.score.timings import add_write_seconds, scan_stats

MAX_CONCURRENT_READS = 32  # parts read at once: hides an object store's latency
MAX_FAILURES_LISTED = 100  # of a unit; all are counted


@dataclass
class RankedPart:
    """Shards of a unit that are ranked together, with their parts."""

    shards: list[Shard] = field(default_factory=list)
    parts: list[ShardScores] = field(default_factory=list)
    images: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, shard: Shard, part: ShardScores) -> None:
        """Take one more shard in."""
        self.shards.append(shard)
        self.parts.append(part)
        self.images += part.count.scored


@dataclass(frozen=True)
class GroupCompactor:
    """Seals units of one folder of scores, of so many `units`. `advanced` is told that the work goes on.

    Memory: MOST_IMAGES at ten classes each, and READERS encoded parts of 60 bytes an image: 10 GB, measured with a unit
    of 24 million images in shards of 200,000, which is two pieces. One shard that has more is ranked whole: a tar that
    the plan warned of; Parquet files are cut.
    """

    folder: str
    teacher: str
    pod: int
    images_per_class: int
    units: int
    classes: int
    advanced: Callable[[], None]

    def compact(self, unit: ShardGroup, folder: str) -> dict[str, object]:
        """Write a unit's files, or those of its pieces; returns the fields of its receipt."""
        pieces = list(map(partial(self._ranked, unit, folder), self._pieces(unit)))
        return dict(pieces[0]) if len(pieces) == 1 else self._together(unit, folder, pieces)

    def _pieces(self, unit: ShardGroup) -> Iterator[RankedPart]:
        """Read a unit's parts in order, and yield as many together as have MOST_IMAGES: of most units all.

        They are in the order of a hash, so that no piece collects one kind of image, and images are counted: the pieces
        are the same whoever seals the unit. A piece is let go before the next one is read.
        """
        uris = [shard_scores.shard_scores_uri(self.folder, shard) for shard in unit.shards]
        piece = RankedPart()
        with closing(map_prefetched(storage.read_bytes, uris, MAX_CONCURRENT_READS)) as read:
            for shard, uri, data in zip(unit.shards, uris, read, strict=True):
                part = shard_scores.shard_scores_from_parquet(data, uri, self.teacher)
                if part.count.digest != shard.digest():
                    raise shard_scores.corrupt_scores_error(
                        uri, f"It holds scores of shard {part.count.shard}, expected those of {shard.name}"
                    )
                self.advanced()
                if piece.parts and piece.images + part.count.scored > MAX_IMAGES_PER_RANKING:
                    yield piece
                    piece = RankedPart()
                piece.add(shard, part)
        yield piece

    def _ranked(self, unit: ShardGroup, folder: str, piece: RankedPart) -> ShardGroupReceipt:
        """Write the files of a piece of a unit. The seconds count to the shards by their images.

        A piece that is not all of its unit has a name and a folder of its own, and of a class's best a smaller share.
        """
        name, units = unit.digest, float(self.units)
        if len(piece.shards) < len(unit.shards):
            name = content_digest([shard.digest() for shard in piece.shards])
            folder = storage.join(folder, name)
            units *= _size_bytes(unit.shards) / max(_size_bytes(piece.shards), 1)
        metadata = {"teacher": self.teacher, "unit": name, "shards": [shard.name for shard in piece.shards]}
        head = score_file.first_band_size(self.images_per_class, units)
        files = shard_scores.build_group_files(piece.parts, head, self.classes, metadata)
        written = {file: storage.join(folder, f"{file}.parquet") for file in files}
        for file, data in files.items():
            self.advanced()
            storage.write_bytes(written[file], data)
        sealing_s = time.monotonic() - piece.began
        counts = [
            add_write_seconds(one.count, sealing_s * one.count.scored / max(piece.images, 1)) for one in piece.parts
        ]
        return ShardGroupReceipt(
            **written,
            **scan_stats(counts),
            stage="score",
            digest=name,
            folder=folder,
            seconds=round(sum(part.seconds for part in piece.parts) + sealing_s, 3),
            teacher=self.teacher,
            pod=self.pod,
            shards=counts,
            failures=[failure for part in piece.parts for failure in part.failures][:MAX_FAILURES_LISTED],
        )

    def _together(self, unit: ShardGroup, folder: str, pieces: list[ShardGroupReceipt]) -> dict[str, object]:
        """Return the fields of the receipt of a unit that has pieces."""
        counts = [count for piece in pieces for count in piece.shards]
        return {
            **dict(pieces[0]),
            **scan_stats(counts),
            **dict.fromkeys(("scores", "places", "samples"), ""),
            "digest": unit.digest,
            "folder": folder,
            "seconds": round(sum(piece.seconds for piece in pieces), 3),
            "shards": counts,
            "failures": [failure for piece in pieces for failure in piece.failures][:MAX_FAILURES_LISTED],
            "pieces": pieces,
        }


def _size_bytes(shards: Sequence[Shard]) -> int:
    return sum(shard.size_bytes for shard in shards)
