"""Store objects in Google Cloud Storage.

`STORAGE_EMULATOR_HOST` selects an emulator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from google.api_core import exceptions
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage as gcs
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests import RequestException
from requests.adapters import HTTPAdapter

from semiscale.common.errors import SemiscaleError
from semiscale.storage.base import MAX_CONNECTIONS, ObjectInfo, RangeReader, bucket_and_key, object_changed_error


class GcsStore:
    """Objects in GCS.

    A conditional write uses GCS's precondition on the object's generation. It is 0 if there is no object.
    """

    def __init__(self) -> None:
        with _errors("gs://"):
            self._client = gcs.Client()
        # The client keeps ten connections and closes all others after each request. It has no public option for more.
        for scheme in ("https://", "http://"):
            self._client._http.mount(scheme, HTTPAdapter(pool_maxsize=MAX_CONNECTIONS))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = bucket_and_key(prefix.rstrip("/"))
        entry = self.stat(prefix.rstrip("/"))
        if entry:
            yield entry
        # With the slash in the prefix, listing `a` does not page through all of `ab/`.
        fields = "items(name,size,generation),nextPageToken"
        try:
            with _errors(prefix):
                for blob in self._client.list_blobs(bucket, prefix=key and f"{key}/", fields=fields):
                    # Consoles write an object with a final slash to show an empty folder.
                    if not blob.name.endswith("/"):
                        yield _entry(f"gs://{bucket}/{blob.name}", blob)
        except FileNotFoundError:
            return

    def folders(self, prefix: str) -> list[str]:
        bucket, key = bucket_and_key(prefix.rstrip("/"))
        folder = key and f"{key}/"
        fields = "prefixes,nextPageToken"
        listing = self._client.list_blobs(bucket, prefix=folder, delimiter="/", fields=fields)
        try:
            with _errors(prefix):
                # The prefixes are known after all pages have been read.
                for _ in listing:
                    pass
        except FileNotFoundError:
            return []
        return sorted(filter(None, (name[len(folder) : -1] for name in listing.prefixes)))

    def stat(self, uri: str) -> ObjectInfo | None:
        try:
            with _errors(uri):
                blob = self._blob(uri)
                blob.reload()
        except FileNotFoundError:
            return None
        return _entry(uri, blob)

    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes:
        end = None if size is None else start + size - 1
        generation = int(version) if version else None
        try:
            with _errors(uri):
                blob = self._blob(uri)
                return cast(bytes, blob.download_as_bytes(start=start or None, end=end, if_generation_match=generation))
        except exceptions.PreconditionFailed:
            raise object_changed_error(uri) from None
        except exceptions.RequestRangeNotSatisfiable:
            return b""

    def open(self, uri: str, version: str, prefetch: bool) -> BinaryIO:
        return RangeReader(self, uri, version, prefetch).buffered()

    def write(self, uri: str, data: bytes, if_absent: bool) -> bool:
        return self._write(uri, data, generation=0 if if_absent else None)

    def replace(self, uri: str, old: bytes, new: bytes) -> bool:
        # The generation is read before the content. If another process writes in between, the precondition fails.
        entry = self.stat(uri)
        if entry is None or self.read(uri, 0, None, "") != old:
            return False
        return self._write(uri, new, generation=int(entry.version))

    def _write(self, uri: str, data: bytes, generation: int | None) -> bool:
        try:
            with _errors(uri):
                blob = self._blob(uri)
                blob.upload_from_string(data, "application/octet-stream", if_generation_match=generation)
        except exceptions.PreconditionFailed:
            return False
        return True

    def upload(self, path: Path, uri: str) -> None:
        with _errors(uri):
            self._blob(uri).upload_from_filename(str(path))

    def delete(self, uri: str) -> None:
        try:
            with _errors(uri):
                self._blob(uri).delete()
        except FileNotFoundError:
            pass

    def _blob(self, uri: str) -> gcs.Blob:
        bucket, key = bucket_and_key(uri)
        if not key:
            raise FileNotFoundError(uri)
        return self._client.bucket(bucket).blob(key)


def _entry(uri: str, blob: gcs.Blob) -> ObjectInfo:
    return ObjectInfo(uri, int(blob.size), str(blob.generation))


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Translate the client's errors, except those that callers handle themselves."""
    try:
        yield
    except exceptions.NotFound:
        raise FileNotFoundError(uri) from None
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise PermissionError(f"{uri}: {error.message}") from None
    except (exceptions.PreconditionFailed, exceptions.RequestRangeNotSatisfiable):
        raise
    except (exceptions.GoogleAPIError, GoogleAuthError, RequestException, DataCorruption, InvalidResponse) as error:
        raise SemiscaleError(
            "SEMI-E025", f"{uri}: the request failed: {error}. Check the store, then run it again."
        ) from error
