"""Layout: the tar, and the place in it, that each row of D̂ goes to.

Both are functions of the seed and the row's identity, (shard name, index, class), the number of its image's classes,
and the number of tars: no pod has to ask another. An image in c classes is stored c times (section 3.2: "allowing the
image to be replicated"): its copies go to tars as far from each other as can be, never to the same one while there are
at least c tars; within one tar they stand a c-th of it apart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semiscale.scores import score_file
from semiscale.scores.score_file import U64
from semiscale.stages.pack.selection_columns import I64, SelectionColumns


@dataclass(frozen=True)
class TarLayout:
    """`order` holds D̂'s rows in packed order; tar t has those from `edges[t]` to `edges[t + 1]`."""

    order: I64
    edges: list[int]

    def rows_in_tar(self, tar: int) -> I64:
        """Return the rows of one tar, in order."""
        return self.order[self.edges[tar] : self.edges[tar + 1]]

    @property
    def tars(self) -> list[int]:
        """The tars that have rows: of very large images, one may have none."""
        return [tar for tar in range(len(self.edges) - 1) if self.edges[tar] < self.edges[tar + 1]]


def plan_layout(rows: SelectionColumns, tar_bytes: int, seed: int) -> TarLayout:
    """Deal D̂ into tars of about `tar_bytes`: rows fall into them at random, so that sizes differ by a few percent.

    Time: two sorts. Memory: about 90 bytes a row while it lasts, the rows included. Measured in benchmarks/pack.py.
    """
    tars = max(-(-int(rows.size_bytes.sum()) // tar_bytes), 1)
    codes = score_file.encode_sample_ids(0, rows.index) | rows.shard.astype(np.uint64) << np.uint64(32)
    lots = score_file.splitmix64(
        score_file.tie_breakers(codes, rows.shards) + score_file.splitmix64(np.array([seed], np.uint64))
    )
    copy, copies = number_replicas(codes, rows.label)
    # Copies 0 to c - 1 of an image step through the tars by tars / c, which is 1 or more while there are c tars.
    first = ((lots >> np.uint64(32)) * np.uint64(tars) >> np.uint64(32)).astype(np.int64)
    tar = (first + copy * tars // copies) % tars
    turn = np.uint64(2**64 - 1) // copies.astype(np.uint64)
    place = score_file.splitmix64(lots) + copy.astype(np.uint64) * turn  # on a circle of 2^64 places
    order = np.lexsort((place, tar))
    return TarLayout(order, np.searchsorted(tar[order], np.arange(tars + 1)).tolist())


def number_replicas(codes: U64, label: NDArray[np.uint16]) -> tuple[I64, I64]:
    """Number each image's rows from 0, by class, and count them; `codes` tell the images apart."""
    by_image = np.lexsort((label, codes))
    starts = np.flatnonzero(np.diff(codes[by_image], prepend=~codes[by_image[:1]]))
    counts = np.diff(starts, append=len(codes))
    copy, copies = np.empty((2, len(codes)), np.int64)
    copy[by_image] = np.arange(len(codes)) - np.repeat(starts, counts)
    copies[by_image] = np.repeat(counts, counts)
    return copy, copies
