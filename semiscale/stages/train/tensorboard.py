"""TensorBoard's event files: scalars over images processed.

The `tensorboard` package would bring a web server into the image, and tensorboardX costs a second and a half of
imports in every training. What they would do here is this: protocol buffers (tensorflow/core/util/event.proto) of four
fields, in TFRecord's frames, each with a masked CRC-32C.
"""

import struct
import time

import google_crc32c

_MASK = 0xA282EAD8  # TFRecord's, so that the checksum of data that hold checksums does not degenerate


def file_header_record() -> bytes:
    """Return the record that an event file begins with."""
    return _record(_wall_time() + _field(3, b"brain.Event:2"))


def session_start_record(images: int) -> bytes:
    """Return the record that makes a reader forget what was recorded at or after so many images."""
    return _record(_wall_time() + _step(images) + _field(7, b"\x08\x01"))


def scalars_record(images: int, values: dict[str, float]) -> bytes:
    """Return the record of some scalars after so many images processed."""
    content = b"".join(
        _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()
    )
    return _record(_wall_time() + _step(images) + _field(5, content))


def _wall_time() -> bytes:
    return b"\x09" + struct.pack("<d", time.time())


def _step(images: int) -> bytes:
    return b"\x10" + _varint(images)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)
