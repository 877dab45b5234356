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

# The first request reads this much of the end of a file. It contains the whole footer of most files.
TAIL_BYTES = 8 << 10


def corrupt_file_error(uri: str, what: str) -> SemiscaleError:
    """Return the error of a shard group's file that is not as it was written.

    The parts of the shard group are kept, so that the scoring can build the file again.

    Args:
        uri: The file.
        what: What is wrong with it.
    """
    return SemiscaleError(
        "SEMI-E027", f"{uri}: {what}. Delete the folder {uri.rpartition('/')[0]} and run the scoring again."
    )


@contextmanager
def reraise_as_corrupt(uri: str) -> Iterator[None]:
    """Turn Arrow's errors, which do not name the file, into an error that does.

    Arrow raises ValueError and OSError for a file that is truncated or overwritten.

    Raises:
        SemiscaleError: Arrow raised an error inside the block.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise corrupt_file_error(uri, f"damaged: {str(error).partition(chr(10))[0]}") from None


class RowGroupReader:
    """Reads the row groups of one Parquet file of a shard group.

    `bytes_read` counts the bytes that the store returned.

    Raises:
        SemiscaleError: The file is missing or damaged.

    Cost:
        One request for the file's size, and one or two for its footer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bytes_read = 0
        self.metadata = self._read_metadata()

    def read(self, number: int, columns: list[str]) -> pa.Table:
        """Read some columns of a row group.

        Args:
            number: Index of the row group.
            columns: Names of the columns.

        Raises:
            SemiscaleError: The file is damaged.

        Cost:
            One request, which also reads the bytes between the columns.
        """
        group = self.metadata.row_group(number)
        all_chunks = (group.column(index) for index in range(group.num_columns))
        chunks = [chunk for chunk in all_chunks if chunk.path_in_schema in columns]
        start = min(map(_chunk_offset, chunks))
        end = max(_chunk_offset(chunk) + chunk.total_compressed_size for chunk in chunks)
        file_range = _FileRange(self._read(start, end - start), start)
        with reraise_as_corrupt(self.uri):
            parquet = pq.ParquetFile(file_range, metadata=self.metadata)
            return parquet.read_row_group(number, columns=columns, use_threads=False)

    def _read_metadata(self) -> pq.FileMetaData:
        """Read the footer of the file. The four bytes before the last four hold its size."""
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


def _chunk_offset(chunk: pq.ColumnChunkMetaData) -> int:
    """Return the offset of a column chunk.

    A chunk begins with its dictionary page if it has one.
    """
    return int(chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset)


class _FileRange(io.BytesIO):
    """A range of a file that is read with the offsets of the whole file.

    A seek to an offset before the range is a ValueError.
    """

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__(data)
        self._start = start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self._start if whence == io.SEEK_SET else offset, whence) + self._start

    def tell(self) -> int:
        return super().tell() + self._start
