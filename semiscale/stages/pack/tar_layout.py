"""Assign each row of D̂ to a tar, and to a position in it.

Both are functions of the seed, the number of tars, and the row. The row counts by its identity (shard name, index,
class) and by the number of classes of its image. Therefore pods agree without communication.

An image in c classes is stored c times (section 3.2: "allowing the image to be replicated"). Its copies go to tars that
are as far from each other as possible. With at least c tars, no tar has two of them. Copies in the same tar are a c-th
of it apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiscale.scores import score_file
from semiscale.scores.score_file import U64
from semiscale.stages.pack.selection_columns import I64, SelectionColumns


@dataclass(frozen=True)
class TarLayout:
    """The rows of each tar.

    Attributes:
        order: The rows of D̂ in packed order.
        edges: Tar t has the rows `order[edges[t]:edges[t + 1]]`.
    """

    order: I64
    edges: list[int]

    def rows_in_tar(self, tar: int) -> I64:
        """Return the rows of one tar, in order."""
        return self.order[self.edges[tar] : self.edges[tar + 1]]

    @property
    def tars(self) -> list[int]:
        """Return the tars that have rows. A tar can be empty if images are very large."""
        return [tar for tar in range(len(self.edges) - 1) if self.edges[tar] < self.edges[tar + 1]]


def plan_layout(rows: SelectionColumns, tar_bytes: int, seed: int) -> TarLayout:
    """Assign the rows of D̂ to tars at random.

    The sizes of the tars differ by a few percent, because the assignment is random.

    Args:
        rows: D̂.
        tar_bytes: The approximate size of a tar, in bytes.
        seed: Seeds the assignment.

    Cost:
        Two sorts of the rows. Memory of about 90 bytes a row during the call, the rows included. benchmarks/pack.py
        measures it.
    """
    tars = max(-(-int(rows.size_bytes.sum()) // tar_bytes), 1)
    codes = score_file.encode_sample_ids(0, rows.index) | rows.shard.astype(np.uint64) << np.uint64(32)
    # One random number for each image, which all its copies share.
    hashes = score_file.splitmix64(
        score_file.tie_breakers(codes, rows.shards) + score_file.splitmix64(np.array([seed], np.uint64))
    )
    copy, copies = number_replicas(codes, rows.label)
    # Copy 0 of an image goes to tar floor(h * tars), where h in [0, 1) is the high half of the hash. Each further copy
    # goes tars / copies tars further. This is at least one tar if there are as many tars as copies.
    first = ((hashes >> np.uint64(32)) * np.uint64(tars) >> np.uint64(32)).astype(np.int64)
    tar = (first + copy * tars // copies) % tars
    # Positions lie on a circle of 2^64 points. The copies of an image divide it into equal arcs.
    arc = np.uint64(2**64 - 1) // copies.astype(np.uint64)
    position = score_file.splitmix64(hashes) + copy.astype(np.uint64) * arc
    order = np.lexsort((position, tar))
    return TarLayout(order, np.searchsorted(tar[order], np.arange(tars + 1)).tolist())


def number_replicas(codes: U64, label: NDArray[np.uint16]) -> tuple[I64, I64]:
    """Number the rows of each image.

    Args:
        codes: A code for each row, which is equal for equal images.
        label: The class of each row.

    Returns:
        The number of each row among the rows of its image, from 0 and in order of class, and the number of these rows.
    """
    by_image = np.lexsort((label, codes))
    starts = np.flatnonzero(np.diff(codes[by_image], prepend=~codes[by_image[:1]]))
    counts = np.diff(starts, append=len(codes))
    copy, copies = np.empty((2, len(codes)), np.int64)
    copy[by_image] = np.arange(len(codes)) - np.repeat(starts, counts)
    copies[by_image] = np.repeat(counts, counts)
    return copy, copies
