"""Read and write the bucket of the golden workdir without the program.

The bucket is on an S3 server of the tests.
"""

import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3

NAME = "semiscale-golden"
HERE = Path(__file__).resolve().parent / "data"
FIXTURE = HERE / "workdir-0.1.0.tar.xz"
GOLDEN = HERE / "workdir-0.1.0.json"
# Some names have a random part or a time. Everything else in a name is a digest, a number or a word.
RANDOM_PARTS = (
    (re.compile(r"(/checkpoints/\d{15})-[0-9a-f]{8}\."), r"\1-RANDOM."),
    (re.compile(r"/events\.out\.tfevents\.\d{17}\.[^/]+$"), "/events.out.tfevents.TIME.RANDOM"),
)
# The evaluation measures only the best model of each sweep. The best model may depend on the processor.
PREDICTIONS = "work/stages/evaluate/predictions/"


class Bucket:
    """The objects of the bucket by their keys.

    The environment has the address of the server.
    """

    def __init__(self) -> None:
        self._client = boto3.client("s3")

    def empty(self) -> None:
        """Create the bucket if it is missing, and delete all its objects."""
        self._client.create_bucket(Bucket=NAME)
        if listed := [{"Key": key} for key in self.etags()]:
            self._client.delete_objects(Bucket=NAME, Delete={"Objects": listed, "Quiet": True})

    def etags(self, prefix: str = "") -> dict[str, str]:
        """Return the ETag of every object, by key."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=prefix)
        return {item["Key"]: item["ETag"].strip('"') for page in pages for item in page.get("Contents", [])}

    def read(self, key: str) -> bytes:
        """Read an object."""
        data: bytes = self._client.get_object(Bucket=NAME, Key=key)["Body"].read()
        return data

    def write(self, key: str, data: bytes) -> None:
        """Write an object."""
        self._client.put_object(Bucket=NAME, Key=key, Body=data)

    def delete(self, key: str) -> None:
        """Delete an object."""
        self._client.delete_object(Bucket=NAME, Key=key)

    def fill(self, objects: Mapping[str, bytes]) -> None:
        """Write many objects."""
        for key, data in objects.items():
            self.write(key, data)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def pack_objects(objects: Mapping[str, bytes]) -> bytes:
    """Return objects as a compressed tar. Equal objects give equal bytes.

    Equal objects are stored once. `lp` and `pb` of 2 tell the compressor that the numbers of tensors have four bytes.
    """
    buffer = io.BytesIO()
    names_by_content: dict[str, str] = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, data in sorted(objects.items(), key=lambda item: (item[0].rpartition(".")[2], item[0])):
            member = tarfile.TarInfo(key)
            content = hashlib.sha256(data).hexdigest()
            if data and content in names_by_content:
                member.type, member.linkname = tarfile.LNKTYPE, names_by_content[content]
                tar.addfile(member)
                continue
            names_by_content[content] = key
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
    return lzma.compress(buffer.getvalue(), filters=filters)


def unpack_objects(path: Path = FIXTURE) -> dict[str, bytes]:
    """Read the objects of a compressed tar."""
    objects: dict[str, bytes] = {}
    with tarfile.open(path, "r:xz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file
            objects[member.name] = file.read()
    return objects


def golden() -> dict[str, Any]:
    """Read the list of all paths and of the objects that the archive does not have."""
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


def path_of(key: str) -> str:
    """Return a key without its random part."""
    for pattern, replacement in RANDOM_PARTS:
        key = pattern.sub(replacement, key)
    return key
