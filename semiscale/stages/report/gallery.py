"""The gallery: for some classes the images at ranks 1, 10, 100, … and the last, as in the paper's Figure 2."""

import base64
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from semiscale import storage
from semiscale.data import parquet_reader, reader, video_decoding
from semiscale.data.image_decoding import DecodeError, ImageArray, decode_image
from semiscale.data.shard import SampleFields, Shard, ShardGroup
from semiscale.observability.progress import Progress
from semiscale.receipts.merge import SelectionReceipt
from semiscale.receipts.plan import PlanReceipt

MAX_CLASSES = 20
THUMBNAIL_PX = 96
SOURCE_CHANGED = "gone or changed since it was scored"
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery: `source` is a data: URI, or empty where `problem` says why there is no image.

    `rank` counts from 1; `score` is log-odds; `tiny` images are enlarged, pixel by pixel.
    """

    rank: int
    score: float
    shard: str
    key: str
    source: str
    tiny: bool
    problem: str


@dataclass(frozen=True)
class GalleryRow:
    """One class: an image per rank of the gallery, None beyond the class's last; then the last."""

    name: str
    shown: list[GalleryImage | None]
    last: GalleryImage | None


@dataclass(frozen=True)
class Gallery:
    """Some classes by some ranks. `classes` counts all there are."""

    ranks: list[int]
    rows: list[GalleryRow]
    classes: int


def build_gallery(plan: PlanReceipt, selection: SelectionReceipt, columns: SampleFields) -> Gallery:
    """Read and shrink the gallery's images; of a video, its middle frame. One that is gone or changed is shown as such.

    Costs one small read an image from tars and loose files, and its row group from a Parquet file.
    """
    classes = evenly_spaced(len(selection.per_class), MAX_CLASSES)
    ranks = powers_of_ten(selection.images_per_class)
    wanted = {label: {*ranks, selection.per_class[label].found} for label in classes}
    rows = _rows(
        selection.selection, {label: ranks for label, ranks in wanted.items() if selection.per_class[label].found}
    )
    inside = _inside_parquet(plan, rows, columns)
    still = video_decoding.decode_middle_frame if columns.videos else decode_image
    progress = Progress("report", len(rows))
    shown = {}
    for row in rows:
        shown[row["class"], row["rank"] + 1] = _shown(row, inside, still)
        progress.update(1)
    return Gallery(
        ranks=ranks,
        rows=[
            GalleryRow(
                name=selection.per_class[label].name,
                shown=[shown.get((label, rank)) for rank in ranks],
                last=shown.get((label, selection.per_class[label].found)),
            )
            for label in classes
        ],
        classes=len(selection.per_class),
    )


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spaced, first and last included."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def powers_of_ten(below: int) -> list[int]:
    """Return 1, 10, 100, … below a number."""
    return [10**exponent for exponent in range(len(str(below))) if 10**exponent < below]


def thumbnail(pixels: ImageArray) -> tuple[str, bool]:
    """Return an image as a data: URI of at most THUMBNAIL_PX a side, and whether it was smaller."""
    image = Image.fromarray(pixels)
    tiny = max(image.size) < THUMBNAIL_PX
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    kind = "png" if tiny else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", tiny


def _rows(uri: str, wanted: dict[int, set[int]]) -> list[dict[str, Any]]:
    """Read the rows at these ranks, from 1, of these classes; the file's statistics spare most of its row groups."""
    filters = [
        [("class", "=", label), ("rank", "in", [rank - 1 for rank in sorted(ranks)])] for label, ranks in wanted.items()
    ]
    with storage.open_object(uri) as file:
        rows: list[dict[str, Any]] = pq.read_table(file, filters=filters or None).to_pylist()
    return rows


def _shown(
    row: dict[str, Any], inside: dict[tuple[str, int], bytes], still: Callable[[bytes], ImageArray]
) -> GalleryImage:
    source, tiny, problem = "", False, ""
    try:
        source, tiny = thumbnail(still(_image(row, inside)))
    except FileNotFoundError:
        problem = SOURCE_CHANGED
    except DecodeError as error:
        problem = str(error)
    return GalleryImage(row["rank"] + 1, row["score"], row["shard"], row["key"], source, tiny, problem)


def _image(row: dict[str, Any], inside: dict[tuple[str, int], bytes]) -> bytes:
    """Return a row's image. Raises FileNotFoundError where it is gone, Undecodable where its bytes are others now."""
    if row["offset"] >= 0:
        image = reader.read_sample_bytes(row["uri"], row["offset"], row["size_bytes"])
    elif (row["shard"], row["index"]) in inside:
        image = inside[row["shard"], row["index"]]
    else:
        raise FileNotFoundError(row["uri"])
    if len(image) != row["size_bytes"]:
        raise DecodeError(SOURCE_CHANGED)
    return image


def _inside_parquet(
    plan: PlanReceipt, rows: Iterable[dict[str, Any]], columns: SampleFields
) -> dict[tuple[str, int], bytes]:
    """Read the images that lie inside Parquet files, where they have no place of their own."""
    wanted: dict[str, set[int]] = {}
    for row in rows:
        if row["offset"] < 0:
            wanted.setdefault(row["shard"], set()).add(row["index"])
    if not wanted:
        return {}
    units = [ShardGroup.model_validate(unit) for unit in json.loads(storage.read_bytes(plan.units))]
    shards = {shard.name: shard for unit in units for shard in unit.shards if shard.name in wanted}
    return {
        (name, index): image
        for name, shard in shards.items()
        for index, image in _picked(shard, wanted[name], columns).items()
    }


def _picked(shard: Shard, indexes: set[int], columns: SampleFields) -> dict[int, bytes]:
    """Read some images of a Parquet file. In one that is gone or changed, none are found."""
    entry = storage.head(shard.uri)
    if entry is None or entry.version != shard.version:
        return {}
    return {sample.index: sample.image for sample in parquet_reader.read_samples_at(shard, indexes, columns)}
