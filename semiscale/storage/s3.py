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

MAX_ATTEMPTS = 8  # of each request, and of each body: half a minute of a store that is slow or restarting
FIRST_CHUNK, CHUNK = 1 << 20, 1 << 14  # bytes of a body at a time, of which a line that breaks loses what is under way


class S3Store:
    """Objects in S3. Conditions are S3's conditional writes: `If-None-Match: *`, and `If-Match` with the ETag."""

    def __init__(self) -> None:
        with _errors("s3://"):
            retries: dict[str, Any] = {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS}
            self._client = boto3.client("s3", config=Config(max_pool_connections=MAX_CONNECTIONS, retries=retries))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        bucket, key = bucket_and_key(prefix.rstrip("/"))
        itself = self.stat(prefix.rstrip("/"))
        if itself:
            yield itself
        # With the slash in the prefix, listing `a` does not page through all of `ab/`.
        for page in self._pages(bucket, key and f"{key}/"):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # what consoles write to show an empty folder
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
                return self._body(_bucket_and_key(uri), start, size, version)
        except ClientError as error:
            if _status(error) == 416:  # the range starts at the object's end or past it
                return b""
            if _status(error) == 412:
                raise object_changed_error(uri) from None
            raise

    def _body(self, place: dict[str, str], start: int, size: int | None, version: str) -> bytes:
        """Read an object's bytes. The client retries a request, but not a body that ends short.

        Of a version that is known what came is kept and the rest asked for, and attempts count from the last byte that
        came: a bad line cuts every download of some size. What may change meanwhile is asked for as a whole.
        """
        condition = {"IfMatch": version} if version else {}
        data, attempt = bytearray(), 0
        while True:
            had = len(data)
            answer = self._client.get_object(**place, **_range(start + had, size and size - had), **condition)
            try:
                for chunk in answer["Body"].iter_chunks(FIRST_CHUNK if attempt == had == 0 else CHUNK):
                    data += chunk
            except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError):
                if len(data) < had + answer["ContentLength"]:
                    if not version:
                        data.clear()
                    attempt = 0 if len(data) > had else attempt + 1
                    if attempt == MAX_ATTEMPTS:
                        raise
                    time.sleep(random.random() * 0.1 * 2**attempt)  # noqa: S311 - spreads the retries of many pods
                    continue
            return bytes(data)

    def open(self, uri: str, version: str, ahead: bool) -> BinaryIO:
        return RangeReader(self, uri, version, ahead).buffered()

    def write(self, uri: str, data: bytes, if_absent: bool) -> bool:
        return self._write(uri, data, {"IfNoneMatch": "*"} if if_absent else {})

    def replace(self, uri: str, old: bytes, new: bytes) -> bool:
        # The ETag is asked for first: what is written in between fails the condition, whatever was read.
        entry = self.stat(uri)
        if entry is None or self.read(uri, 0, None, "") != old:
            return False
        return self._write(uri, new, {"IfMatch": entry.version})

    def _write(self, uri: str, data: bytes, condition: dict[str, Any]) -> bool:
        try:
            with _errors(uri):
                self._client.put_object(**_bucket_and_key(uri), Body=data, **condition)
        except ClientError as error:
            # 412: it does not hold. 409: another conditional write won while this was on its way (S3's documentation).
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
    """Raise the project's errors for the client's, except those that a caller takes for an answer."""
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
