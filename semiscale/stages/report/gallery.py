"""Build the gallery: images at ranks 1, 10, 100, … and the last (paper, Figure 2)."""

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
    """One image of the gallery.

    Attributes:
        rank: Rank in its class, from 1.
        score: Log-odds of the class.
        shard: Name of its shard.
        key: Key of the sample.
        source: A data: URI, or empty if there is no image.
        tiny: Whether the page enlarges the image, pixel by pixel.
        problem: Reason why there is no image.
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
    """Images of one class.

    Attributes:
        name: Name of the class.
        images: Image at each rank, or None beyond the last rank.
        last: Image at the last rank, or None if the class has no image.
    """

    name: str
    images: list[GalleryImage | None]
    last: GalleryImage | None


@dataclass(frozen=True)
class Gallery:
    """Images of some classes by rank.

    Attributes:
        ranks: Ranks of the columns, from 1.
        rows: Rows of the gallery, one for each class.
        classes: Number of all classes of the run.
    """

    ranks: list[int]
    rows: list[GalleryRow]
    classes: int


def build_gallery(plan: PlanReceipt, selection: SelectionReceipt, columns: SampleFields) -> Gallery:
    """Read and shrink the images of the gallery.

    A video is represented by its middle frame. A missing or changed image has a reason instead of pixels.

    Args:
        plan: The receipt of the plan, which names the shard groups.
        selection: The receipt of the merge.
        columns: Column of the images in Parquet files, and whether the samples are videos.

    Returns:
        The gallery of at most MAX_CLASSES classes.

    Cost:
        One small read for each image in a tar or loose file, and one row group for each in a Parquet file.
    """
    classes = evenly_spaced(len(selection.per_class), MAX_CLASSES)
    ranks = powers_of_ten(selection.images_per_class)
    wanted = {label: {*ranks, selection.per_class[label].found} for label in classes}
    rows = _read_rows(
        selection.selection, {label: ranks for label, ranks in wanted.items() if selection.per_class[label].found}
    )
    parquet_images = _read_parquet_images(plan, rows, columns)
    decode = video_decoding.decode_middle_frame if columns.videos else decode_image
    progress = Progress("report", len(rows), unit="gallery images")
    images = {}
    for row in rows:
        images[row["class"], row["rank"] + 1] = _build_image(row, parquet_images, decode)
        progress.update(1)
    return Gallery(
        ranks=ranks,
        rows=[
            GalleryRow(
                name=selection.per_class[label].name,
                images=[images.get((label, rank)) for rank in ranks],
                last=images.get((label, selection.per_class[label].found)),
            )
            for label in classes
        ],
        classes=len(selection.per_class),
    )


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return evenly spaced numbers below `count`, first and last included.

    Args:
        count: Upper bound, exclusive.
        most: Largest number of values, 2 or more.

    Returns:
        At most `most` numbers.
    """
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def powers_of_ten(below: int) -> list[int]:
    """Return 1, 10, 100, … below a number."""
    return [10**exponent for exponent in range(len(str(below))) if 10**exponent < below]


def thumbnail(pixels: ImageArray) -> tuple[str, bool]:
    """Shrink an image to at most THUMBNAIL_PX on each side.

    Args:
        pixels: Image, height x width x 3.

    Returns:
        A `data:` URI, and whether both sides were smaller than THUMBNAIL_PX before.
    """
    image = Image.fromarray(pixels)
    tiny = max(image.size) < THUMBNAIL_PX
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    kind = "png" if tiny else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", tiny


def _read_rows(uri: str, wanted: dict[int, set[int]]) -> list[dict[str, Any]]:
    """Read the rows at the wanted ranks, from 1, of each class.

    The statistics of the file let most of its row groups be skipped.
    """
    filters = [
        [("class", "=", label), ("rank", "in", [rank - 1 for rank in sorted(ranks)])] for label, ranks in wanted.items()
    ]
    with storage.open_object(uri) as file:
        rows: list[dict[str, Any]] = pq.read_table(file, filters=filters or None).to_pylist()
    return rows


def _build_image(
    row: dict[str, Any], parquet_images: dict[tuple[str, int], bytes], decode: Callable[[bytes], ImageArray]
) -> GalleryImage:
    source, tiny, problem = "", False, ""
    try:
        source, tiny = thumbnail(decode(_read_image(row, parquet_images)))
    except FileNotFoundError:
        problem = SOURCE_CHANGED
    except DecodeError as error:
        problem = str(error)
    return GalleryImage(row["rank"] + 1, row["score"], row["shard"], row["key"], source, tiny, problem)


def _read_image(row: dict[str, Any], parquet_images: dict[tuple[str, int], bytes]) -> bytes:
    """Return the bytes of a row's image.

    Raises:
        FileNotFoundError: If the image is missing.
        DecodeError: If its size has changed.
    """
    if row["offset"] >= 0:
        image = reader.read_sample_bytes(row["uri"], row["offset"], row["size_bytes"])
    elif (row["shard"], row["index"]) in parquet_images:
        image = parquet_images[row["shard"], row["index"]]
    else:
        raise FileNotFoundError(row["uri"])
    if len(image) != row["size_bytes"]:
        raise DecodeError(SOURCE_CHANGED)
    return image


def _read_parquet_images(
    plan: PlanReceipt, rows: Iterable[dict[str, Any]], columns: SampleFields
) -> dict[tuple[str, int], bytes]:
    """Read the images in Parquet files, which have no byte offset, by shard and index."""
    wanted: dict[str, set[int]] = {}
    for row in rows:
        if row["offset"] < 0:
            wanted.setdefault(row["shard"], set()).add(row["index"])
    if not wanted:
        return {}
    groups = [ShardGroup.model_validate(group) for group in json.loads(storage.read_bytes(plan.units))]
    shards = {shard.name: shard for group in groups for shard in group.shards if shard.name in wanted}
    return {
        (name, index): image
        for name, shard in shards.items()
        for index, image in _read_from_shard(shard, wanted[name], columns).items()
    }


def _read_from_shard(shard: Shard, indexes: set[int], columns: SampleFields) -> dict[int, bytes]:
    """Read some images of a Parquet file by index, or none if the file has changed."""
    entry = storage.head(shard.uri)
    if entry is None or entry.version != shard.version:
        return {}
    return {sample.index: sample.image for sample in parquet_reader.read_samples_at(shard, indexes, columns)}
