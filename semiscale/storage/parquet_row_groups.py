"""Read the row groups of a Parquet file with one ranged request each.

A reader can stop after the rows that it needs.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from semiscale import storage
from semiscale.common.errors import SemiscaleError

TAIL_BYTES = 8 << 10  # read from the end of a file at first: the footer of most, in one request


def corrupt_file_error(uri: str, what: str) -> SemiscaleError:
    """Return the error of a unit's file that is not as it was written; the unit's parts are kept to make it anew."""
    return SemiscaleError(
        "SEMI-E027", f"{uri}: {what}. Delete the folder {uri.rpartition('/')[0]} and run the scoring again."
    )


@contextmanager
def reraise_as_corrupt(uri: str) -> Iterator[None]:
    """Name the file where Arrow finds it cut off or overwritten. Arrow's errors are ValueErrors and OSErrors."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise corrupt_file_error(uri, f"damaged: {str(error).partition(chr(10))[0]}") from None


class RowGroupReader:
    """The row groups of one Parquet file of a unit. `bytes_read` counts what was asked of the store.

    The footer costs one or two requests and a look at the file's size. Raises SemiscaleError where there is no file or
    it is damaged.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bytes_read = 0
        self.metadata = self._read_metadata()

    def read(self, number: int, columns: list[str]) -> pa.Table:
        """Read some columns of a row group; what lies between them in the file is read too."""
        group = self.metadata.row_group(number)
        places = (group.column(place) for place in range(group.num_columns))
        chunks = [chunk for chunk in places if chunk.path_in_schema in columns]
        start = min(map(_first_byte, chunks))
        end = max(_first_byte(chunk) + chunk.total_compressed_size for chunk in chunks)
        part = _Part(self._read(start, end - start), start)
        with reraise_as_corrupt(self.uri):
            parquet = pq.ParquetFile(part, metadata=self.metadata)
            return parquet.read_row_group(number, columns=columns, use_threads=False)

    def _read_metadata(self) -> pq.FileMetaData:
        """Read Parquet's own metadata, whose size stands before the last four bytes of the file."""
        entry = storage.head(self.uri)
        if entry is None:
            raise corrupt_file_error(self.uri, "no such file")
        start = max(entry.size_bytes - TAIL_BYTES, 0)
        tail = self._read(start, entry.size_bytes - start)
        missing = int.from_bytes(tail[-8:-4], "little") + 8 - len(tail)
        if 0 < missing <= start:
            tail = self._read(start - missing, missing) + tail
        with reraise_as_corrupt(self.uri):
            return pq.read_metadata(pa.BufferReader(tail))

    def _read(self, start: int, size_bytes: int) -> bytes:
        data = storage.read_bytes(self.uri, start, size_bytes)
        self.bytes_read += len(data)
        return data


def _first_byte(chunk: pq.ColumnChunkMetaData) -> int:
    """Return where a column chunk begins: at its dictionary where it has one."""
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


class _Part(io.BytesIO):
    """A part of a file that answers as the whole would; a read outside of the part is a ValueError."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__(data)
        self._start = start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self._start if whence == io.SEEK_SET else offset, whence) + self._start

    def tell(self) -> int:
        return super().tell() + self._start
