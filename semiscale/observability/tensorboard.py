"""Encode TensorBoard's event files: scalars over images processed.

An event file is a sequence of protocol buffers in the frames of TFRecord, each with a masked CRC-32C. The buffers have
four fields of tensorflow/core/util/event.proto.

These few lines replace a library. The `tensorboard` package would bring a web server into the image. tensorboardX takes
a second and a half to import in every training.
"""

import struct
import time

import google_crc32c

# TFRecord masks its checksums, because the CRC of data that contain their own CRC is weak.
_MASK = 0xA282EAD8


def file_header_record() -> bytes:
    """Return the record at the start of an event file."""
    return _record(_wall_time() + _field(3, b"brain.Event:2"))


def session_start_record(images: int) -> bytes:
    """Return the record that makes a reader drop scalars of so many images or more."""
    return _record(_wall_time() + _step(images) + _field(7, b"\x08\x01"))


def scalars_record(images: int, values: dict[str, float]) -> bytes:
    """Return the record of some scalars.

    Args:
        images: Images processed, the x-axis of TensorBoard.
        values: The scalars by tag.
    """
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
