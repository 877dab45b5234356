"""Store objects in Amazon S3 and compatible stores through boto3.

`AWS_ENDPOINT_URL` selects MinIO or a test server.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.storage.base import MAX_CONNECTIONS, ObjectInfo, RangeReader, bucket_and_key, object_changed_error

# Attempts of each request and of each body. They outlast half a minute of a store that is slow or restarting.
MAX_ATTEMPTS = 8
# Bytes of a body that are read at a time. A broken connection loses the chunk in progress, so later attempts use small
# chunks.
FIRST_CHUNK_BYTES, RETRY_CHUNK_BYTES = 1 << 20, 1 << 14


class S3Store:
    """Objects in S3.

    A conditional write uses `If-None-Match: *`, or `If-Match` with the ETag.
    """

    def __init__(self) -> None:
        with _errors("s3://"):
            retries: dict[str, Any] = {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS}
            self._client = boto3.client("s3", config=Config(max_pool_connections=MAX_CONNECTIONS, retries=retries))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = bucket_and_key(prefix.rstrip("/"))
        entry = self.stat(prefix.rstrip("/"))
        if entry:
            yield entry
        # With the slash in the prefix, listing `a` does not page through all of `ab/`.
        for page in self._pages(bucket, key and f"{key}/"):
            for item in page.get("Contents", []):
                # Consoles write an object with a final slash to show an empty folder.
                if not item["Key"].endswith("/"):
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))

    def folders(self, prefix: str) -> list[str]:
        bucket, key = bucket_and_key(prefix.rstrip("/"))
        folder = key and f"{key}/"
        pages = self._pages(bucket, folder, Delimiter="/")
        names = (item["Prefix"] for page in pages for item in page.get("CommonPrefixes", []))
        return sorted(filter(None, (name[len(folder) : -1] for name in names)))

    def stat(self, uri: str) -> ObjectInfo | None:
        try:
            with _errors(uri):
                head = self._client.head_object(**_bucket_and_key(uri))
        except FileNotFoundError:
            return None
        return ObjectInfo(uri, head["ContentLength"], head["ETag"].strip('"'))

    def read(self, uri: str, start: int, size: int | None, version: str) -> bytes:
        try:
            with _errors(uri):
                return self._read_body(_bucket_and_key(uri), start, size, version)
        except ClientError as error:
            # The range starts at the object's end or after it.
            if _status(error) == 416:
                return b""
            if _status(error) == 412:
                raise object_changed_error(uri) from None
            raise

    def _read_body(self, key: dict[str, str], start: int, size: int | None, version: str) -> bytes:
        """Read an object's bytes, and retry a body that ends too early.

        The client retries a request, but not its body. If the version is known, the received bytes are kept and the
        next request continues after them. Attempts are counted from the last received byte, because a bad connection
        breaks every large download. Without a version the object may change in between, so it is read again as a whole.
        """
        condition = {"IfMatch": version} if version else {}
        data, attempt = bytearray(), 0
        while True:
            received = len(data)
            response = self._client.get_object(**key, **_range(start + received, size and size - received), **condition)
            chunk_bytes = FIRST_CHUNK_BYTES if attempt == received == 0 else RETRY_CHUNK_BYTES
            try:
                for chunk in response["Body"].iter_chunks(chunk_bytes):
                    data += chunk
            except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError):
                if len(data) < received + response["ContentLength"]:
                    if not version:
                        data.clear()
                    attempt = 0 if len(data) > received else attempt + 1
                    if attempt == MAX_ATTEMPTS:
                        raise
                    # A random pause keeps many pods from retrying at the same time.
                    time.sleep(random.random() * 0.1 * 2**attempt)  # noqa: S311
                    continue
            return bytes(data)

    def open(self, uri: str, version: str, prefetch: bool) -> BinaryIO:
        return RangeReader(self, uri, version, prefetch).buffered()

    def write(self, uri: str, data: bytes, if_absent: bool) -> bool:
        return self._write(uri, data, {"IfNoneMatch": "*"} if if_absent else {})

    def replace(self, uri: str, old: bytes, new: bytes) -> bool:
        # The ETag is read before the content. If another process writes in between, the condition fails.
        entry = self.stat(uri)
        if entry is None or self.read(uri, 0, None, "") != old:
            return False
        return self._write(uri, new, {"IfMatch": entry.version})

    def _write(self, uri: str, data: bytes, condition: dict[str, Any]) -> bool:
        try:
            with _errors(uri):
                self._client.put_object(**_bucket_and_key(uri), Body=data, **condition)
        except ClientError as error:
            # 412: the condition is false. 409: another conditional write finished first (S3's documentation).
            if condition and _status(error) in (409, 412):
                return False
            raise
        return True

    def upload(self, path: Path, uri: str) -> None:
        with _errors(uri):
            self._client.upload_file(str(path), *_bucket_and_key(uri).values())

    def delete(self, uri: str) -> None:
        with _errors(uri):
            self._client.delete_object(**_bucket_and_key(uri))

    def _pages(self, bucket: str, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        try:
            with _errors(f"s3://{bucket}/{prefix}"):
                yield from paginator.paginate(Bucket=bucket, Prefix=prefix, **options)
        except FileNotFoundError:
            return


def _bucket_and_key(uri: str) -> dict[str, str]:
    bucket, key = bucket_and_key(uri)
    if not key:
        raise FileNotFoundError(uri)
    return {"Bucket": bucket, "Key": key}


def _range(start: int, size: int | None) -> dict[str, str]:
    return {"Range": f"bytes={start}-{'' if size is None else start + size - 1}"} if start or size else {}


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    """Translate the client's errors, except those that callers handle themselves."""
    try:
        yield
    except ClientError as error:
        status = _status(error)
        if status == 404:
            raise FileNotFoundError(uri) from None
        if status in (401, 403):
            raise PermissionError(f"{uri}: {error}") from None
        if status in (409, 412, 416):
            raise
        raise SemiscaleError(
            "SEMI-E025", f"{uri}: the request failed: {error}. Check the store, then run it again."
        ) from error
    except ParamValidationError as error:
        raise InvalidInputError(
            "SEMI-E026", f"{uri}: the name is not valid: {' '.join(str(error).split())}. Correct the URI."
        ) from None
    except (Boto3Error, BotoCoreError) as error:
        raise SemiscaleError(
            "SEMI-E025", f"{uri}: the request failed: {error}. Check the store, then run it again."
        ) from error
