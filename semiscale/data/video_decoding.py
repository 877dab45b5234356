"""Decode video bytes to clips of neighbouring RGB frames.

FFmpeg decodes, through PyAV. It is given the name of the container, so a file cannot make it open another file, as
playlists do. Only common codecs are accepted, because bugs in rare decoders are found last.

Frames are numbered in display order. MP4 and Matroska store the display time of each packet, so a clip costs decoding
from the preceding keyframe. AVI does not store it, so decoded frames are counted from the beginning.
"""

import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semiscale.common.errors import InvalidInputError
from semiscale.data.image_decoding import DecodeError, ImageArray
from semiscale.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    import av
    from av.video.frame import VideoFrame

Clip = NDArray[np.uint8]  # clip_THWC, RGB

# Uniformly spaced clips of an evaluated video. Their softmax outputs are averaged (section 5.1).
EVAL_CLIPS = 10
# The ratio of the resized short side of a frame to its crop (supplement 4.2).
SHORT_SIDE_RATIO = 128 / 112
# Twenty minutes at 30 frames a second. Evaluation decodes all frames of a video.
MAX_FRAMES = 36_000
# The largest frame of cameras and cinemas.
MAX_FRAME_PIXELS = 4096 * 2304
# The largest ratio of long to short side. Resizing makes the short side 128 pixels, so this bounds the long one.
MAX_FRAME_ASPECT_RATIO = 16
# The codecs that videos are stored in.
CODECS = (
    *("h264", "hevc", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "mpeg1video", "mpeg2video", "h263", "flv1"),
    *("vp8", "vp9", "av1", "mjpeg", "ffv1", "rawvideo", "png"),
)
CORRUPT, TRUNCATED = "damaged video", "video cut off"


def decode_eval_clips(data: bytes, preprocessing: Preprocessing) -> Clip:
    """Return EVAL_CLIPS uniformly spaced clips of a video, with the centre of each frame.

    Args:
        data: The encoded video.
        preprocessing: The input of the model.

    Returns:
        clips_VTHWC, RGB, uint8.

    Raises:
        DecodeError: The video cannot be decoded.

    Cost:
        Decodes the whole video.
    """
    video = _Video(data)
    starts = uniform_clip_starts(video.frames, preprocessing.frames)
    wanted = np.add.outer(starts, np.arange(preprocessing.frames))
    return _crop_frames(video, wanted, preprocessing, (0.5, 0.5))


def decode_train_clip(data: bytes, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]) -> Clip:
    """Return one training clip, with a random start and a random crop.

    All frames have the same crop. The paper names temporal jittering and a random crop of 112 x 112 from frames of
    128 x 171 (supplement 4.2). It does not name a mirror.

    Args:
        data: The encoded video.
        preprocessing: The input of the model.
        randoms_R: Three uniform numbers: start, row and column of the crop. The clip is a pure function of them.

    Returns:
        clip_THWC, RGB, uint8.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    video = _Video(data)
    start = random_clip_start(video.frames, preprocessing.frames, randoms_R[0])
    wanted = start + np.arange(preprocessing.frames)
    return _crop_frames(video, wanted, preprocessing, (randoms_R[1], randoms_R[2]))


def decode_middle_frame(data: bytes) -> ImageArray:
    """Return the middle frame of a video in its own size.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    video = _Video(data)
    middle = video.frames // 2
    frame = next((frame for number, frame in video.frames_from(middle) if number >= middle), None)
    if frame is None:
        raise DecodeError(CORRUPT)
    return _to_rgb(frame, *_display_size(frame))


def check_decodable(data: bytes) -> None:
    """Decode all of a video.

    Raises:
        DecodeError: A part of the video cannot be decoded.
    """
    video = _Video(data)
    if not sum(1 for _ in video.frames_from(0)):
        raise DecodeError(CORRUPT)


def require_pyav() -> None:
    """Check that PyAV is installed.

    Raises:
        InvalidInputError: PyAV is missing.
    """
    if importlib.util.find_spec("av") is None:
        raise InvalidInputError("SEMI-E063", "frames: Videos need PyAV, which is not installed. Run `pip install av`.")


def frame_short_side(preprocessing: Preprocessing) -> int:
    """Return the short side of a frame before its crop, in pixels."""
    return round(preprocessing.resolution * SHORT_SIDE_RATIO)


def uniform_clip_starts(frames: int, length: int) -> NDArray[np.int64]:
    """Return the first frames of EVAL_CLIPS equally spaced clips.

    The first clip lies at the start of the video and the last one at its end.

    Args:
        frames: The number of frames of the video.
        length: The number of frames of a clip.

    Returns:
        The frame numbers, in order.
    """
    return np.linspace(0, max(frames - length, 0), EVAL_CLIPS).round().astype(np.int64)


def random_clip_start(frames: int, length: int, random: float) -> int:
    """Return the first frame of a random clip.

    All positions inside the video are equally likely.

    Args:
        frames: The number of frames of the video.
        length: The number of frames of the clip.
        random: A uniform number.

    Returns:
        The frame number.
    """
    return int(random * (max(frames - length, 0) + 1))


def detect_container(data: bytes) -> str:
    """Return the container of a video by its first bytes, or "" for other data."""
    container = _match_container(data)
    return container.suffix if container else ""


def _crop_frames(
    video: "_Video", wanted: NDArray[np.int64], preprocessing: Preprocessing, position: tuple[float, float]
) -> Clip:
    """Return the frames with these numbers, resized and cropped.

    The last frame replaces numbers beyond the end of the video.
    """
    numbers, last = set(wanted.ravel().tolist()), int(wanted.max())
    crops: dict[int, ImageArray] = {}
    frame = number = None
    for number, frame in video.frames_from(int(wanted.min())):
        if number in numbers:
            crops[number] = _crop_frame(frame, preprocessing, position)
        if number >= last:
            break
    if frame is None or number is None:
        raise DecodeError(CORRUPT)
    end = crops.get(number)
    end = _crop_frame(frame, preprocessing, position) if end is None else end
    return np.stack([crops.get(index, end) for index in wanted.ravel().tolist()]).reshape(*wanted.shape, *end.shape)


def _crop_frame(frame: "VideoFrame", preprocessing: Preprocessing, position: tuple[float, float]) -> ImageArray:
    size, short = preprocessing.resolution, frame_short_side(preprocessing)
    height, width = _display_size(frame)
    scale = short / min(height, width)
    resized = _to_rgb(frame, max(round(height * scale), size), max(round(width * scale), size))
    top, left = (int(fraction * (side - size + 1)) for fraction, side in zip(position, resized.shape[:2], strict=True))
    return resized[top : top + size, left : left + size]


def _display_size(frame: "VideoFrame") -> tuple[int, int]:
    """Return the displayed height and width of a frame.

    Phones store portrait videos rotated by 90 degrees.
    """
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def _to_rgb(frame: "VideoFrame", height: int, width: int) -> ImageArray:
    """Return a frame upright, as RGB of this size.

    The bilinear filter of FFmpeg is as wide as the reduction, which prevents aliasing.
    """
    _check_frame_size(frame.width, frame.height)
    quarter_turns = frame.rotation // 90
    size = {"width": height, "height": width} if quarter_turns % 2 else {"width": width, "height": height}
    rgb = frame.reformat(**size, format="rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns))


def _check_frame_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise DecodeError(f"frames of more than {MAX_FRAME_PIXELS} pixels")
    if max(width, height) > MAX_FRAME_ASPECT_RATIO * min(width, height):
        raise DecodeError(f"frames more than {MAX_FRAME_ASPECT_RATIO} times as long as wide")


class _Video:
    """A video whose packets are read and not decoded yet. `frames` is the number of stored packets."""

    def __init__(self, data: bytes) -> None:
        container = _match_container(data)
        if container is None:
            raise DecodeError("not a video")
        if container.end(data) > len(data):
            raise DecodeError(TRUNCATED)
        self._stream, self._packets = _open_stream(data, container.format)
        times = [packet.pts for packet in self._packets]
        has_times = container.has_display_times and None not in times and len(set(times)) == len(times)
        self._number = {time: number for number, time in enumerate(sorted(times))} if has_times else {}
        self.frames = len(self._packets)
        if not self.frames:
            raise DecodeError(CORRUPT)
        if self.frames > MAX_FRAMES:
            raise DecodeError(f"more than {MAX_FRAMES} frames")
        if self._stream.frames > self.frames:
            raise DecodeError(TRUNCATED)

    def frames_from(self, start: int) -> Iterator[tuple[int, "VideoFrame"]]:
        """Yield frames with their numbers, in display order.

        The first one is frame `start` or an earlier one. This can be called once only.

        Raises:
            DecodeError: A frame cannot be decoded.
        """
        from av.error import FFmpegError

        number = -1
        try:
            for frame in self._decode(self._packets[self._keyframe_before(start) :]):
                number = self._number.get(frame.pts, number + 1)
                yield number, frame
        except FFmpegError:
            raise DecodeError(CORRUPT) from None

    def _keyframe_before(self, start: int) -> int:
        """Return the packet index of the last keyframe displayed at frame `start` or before.

        Frames that are displayed after a keyframe need no packet that is stored before it.
        """
        keyframes = (
            index
            for index, packet in enumerate(self._packets)
            if packet.is_keyframe and self._number and self._number[packet.pts] <= start
        )
        return max(keyframes, default=0)

    def _decode(self, packets: "Iterable[av.Packet[Any]]") -> Iterator["VideoFrame"]:
        for packet in packets:
            yield from self._check_frames(packet.decode())
        # None flushes the frames that the decoder still holds.
        yield from self._check_frames(self._stream.codec_context.decode(None))

    @staticmethod
    def _check_frames(frames: Iterable[Any]) -> Iterator["VideoFrame"]:
        for frame in frames:
            if frame.is_corrupt:
                raise DecodeError(CORRUPT)
            yield frame


def _open_stream(data: bytes, container_format: str) -> tuple[Any, list[Any]]:
    """Return the video stream and its packets, in stored order."""
    # The import takes a third of a second, so runs of images skip it.
    import av

    try:
        container = av.open(io.BytesIO(data), "r", format=container_format)
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise DecodeError("no video in it, but sound")
        codec = stream.codec_context
        if codec is None or codec.codec.canonical_name not in CODECS:
            raise DecodeError("a codec that is not read")
        _check_frame_size(codec.width, codec.height)
        # Several videos are decoded at the same time.
        codec.thread_count = 1
        return stream, [packet for packet in container.demux(stream) if packet.size]
    except (DecodeError, MemoryError):
        raise
    # FFmpeg's readers report damage by many types of exceptions, as Pillow's do.
    except Exception:  # noqa: BLE001
        raise DecodeError(CORRUPT) from None


def _end_of_riff(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _end_of_boxes(data: bytes) -> int:
    """Return the end of the last MP4 box by its stored size (ISO/IEC 14496-12, 4.2)."""
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        # Size 1 means that 64 bits follow, which store the size.
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        # Size 0 means that the box extends to the end of the file.
        if size < 8:
            return len(data)
        end += size
    return end


def _end_of_segment(data: bytes) -> int:
    """Return the end of a Matroska segment by its stored size (RFC 8794).

    A streamed file does not store the size.
    """
    header, header_size = _element_size(data, 4)
    segment, size = _element_size(data, header + header_size + 4)
    return segment + size


def _element_size(data: bytes, offset: int) -> tuple[int, int]:
    """Read a variable-length size at an offset.

    Returns:
        The offset of the content, and its size in bytes, or 0 if the size is unknown.
    """
    first = data[offset] if offset < len(data) else 0
    length = 9 - first.bit_length()
    size = int.from_bytes(data[offset : offset + length], "big") & ((1 << 7 * length) - 1)
    return offset + length, 0 if size == (1 << 7 * length) - 1 else size


class _Container(NamedTuple):
    """A container format.

    Attributes:
        suffix: The file suffix.
        format: The name in FFmpeg.
        beginning: Matches the first bytes.
        end: Returns the end of the file, in bytes, by the sizes that it stores.
        has_display_times: Whether each packet stores its display time.
    """

    suffix: str
    format: str
    beginning: re.Pattern[bytes]
    end: Callable[[bytes], int]
    has_display_times: bool = True


_CONTAINERS = (
    _Container("avi", "avi", re.compile(rb"RIFF....AVI ", re.DOTALL), _end_of_riff, has_display_times=False),
    _Container("mp4", "mov", re.compile(rb"....(ftyp|moov|mdat|wide|free)", re.DOTALL), _end_of_boxes),
    _Container("mkv", "matroska", re.compile(rb"\x1aE\xdf\xa3"), _end_of_segment),
)


def _match_container(data: bytes) -> _Container | None:
    return next((container for container in _CONTAINERS if container.beginning.match(data)), None)
