"""Small images, tars and Parquet files for tests, and functions to read them."""

import io
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from semiscale.data import listing, reader
from semiscale.data.shard import Sample, SampleFields

Member = tuple[str, bytes]


def make_image(number: int, format: str = "JPEG") -> bytes:
    """Return an image of 8 x 8 pixels in a colour that depends on the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 37 % 256, number * 91 % 256, 128)).save(buffer, format)
    return buffer.getvalue()


def make_tar(members: Iterable[Member | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar.

    Args:
        members: Names with contents, or headers of members without content.
        format: A format constant of tarfile.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def make_parquet(columns: dict[str, Any], **options: Any) -> bytes:
    """Return a Parquet file of these columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def read_samples(uri: str, columns: SampleFields | None = None) -> list[Sample]:
    """List the shards below a URI and read all their samples."""
    return [
        sample
        for shard in listing.list_shards([uri])
        for sample in reader.iter_samples(shard, columns or SampleFields(label=""))
    ]


def read_tar(folder: Path, members: Iterable[Member | tarfile.TarInfo], **options: Any) -> list[Sample]:
    """Write a tar of these members and read it with labels."""
    (folder / "a.tar").write_bytes(make_tar(members, **options))
    return read_samples(str(folder / "a.tar"), SampleFields())


def read_parquet(folder: Path, columns: dict[str, Any], fields: SampleFields | None = None) -> list[Sample]:
    """Write a Parquet file of these columns and read it.

    Args:
        folder: Receives the file `a.parquet`.
        columns: The content.
        fields: The columns to read. Without it, labels are not read.
    """
    (folder / "a.parquet").write_bytes(make_parquet(columns))
    return read_samples(str(folder / "a.parquet"), fields)


def summarize(samples: list[Sample]) -> list[tuple[str, str | None, str]]:
    """Return the key, the label and the problem of each sample."""
    return [(sample.key, sample.label, sample.problem) for sample in samples]


@contextmanager
def trace_memory() -> Iterator[Callable[[], int]]:
    """Trace Python's allocations. The yielded function returns the peak in bytes."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
