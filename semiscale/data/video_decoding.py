"""Video bytes to clips: as many neighbouring frames as a network sees, as RGB, or a reason why not.

FFmpeg decodes, by way of PyAV. It is told which container it reads, so that no file can make it open another one, as
playlists do; the codecs are those that videos are stored in: the bugs of rare decoders are the last to be found.

The frames of a video are numbered in the order that they are shown in. An MP4 or Matroska file says when each packet is
shown, so that a clip costs the decoding from the keyframe before it. AVI does not: what is decoded is counted from the
beginning.
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

EVAL_CLIPS = 10  # of a video that is measured, uniformly spaced; their softmax is averaged (section 5.1)
SHORT_SIDE_RATIO = 128 / 112  # of a frame before it is cut (supplement 4.2)
MAX_FRAMES = 36_000  # twenty minutes at 30 a second; all of a video that is measured are decoded
MAX_PIXELS = 4096 * 2304  # of a frame: the largest that cameras and cinemas use
MAX_ASPECT_RATIO = 16  # a frame's long side by its short one: resizing makes the short side 128
CODECS = (
    *("h264", "hevc", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "mpeg1video", "mpeg2video", "h263", "flv1"),
    *("vp8", "vp9", "av1", "mjpeg", "ffv1", "rawvideo", "png"),
)
CORRUPT, TRUNCATED = "damaged video", "video cut off"


def decode_eval_clips(data: bytes, preprocessing: Preprocessing) -> Clip:
    """Return what a model sees of a video that is measured: CLIPS clips, uniformly spaced, each frame's centre.

    clips_VTHWC. Costs the decoding of the whole video. Raises Undecodable.
    """
    video = _Video(data)
    starts = uniform_clip_starts(video.frames, preprocessing.frames)
    wanted = np.add.outer(starts, np.arange(preprocessing.frames))
    return _crop_frames(video, wanted, preprocessing, (0.5, 0.5))


def decode_train_clip(data: bytes, preprocessing: Preprocessing, randoms_R: NDArray[np.float64]) -> Clip:
    """Return what a model is trained on: a clip that starts anywhere, all of its frames cut at one random place.

    Supplement 4.2: temporal jittering, and a random 112 x 112 of frames of 128 x 171; a mirror it does not name.
    clip_THWC. A pure function of the video and three uniform numbers: its start, and the place of its cut. Raises
    Undecodable.
    """
    video = _Video(data)
    start = random_clip_start(video.frames, preprocessing.frames, randoms_R[0])
    wanted = start + np.arange(preprocessing.frames)
    return _crop_frames(video, wanted, preprocessing, (randoms_R[1], randoms_R[2]))


def decode_middle_frame(data: bytes) -> ImageArray:
    """Return the frame in the middle of a video, in its own size. Raises Undecodable."""
    video = _Video(data)
    middle = video.frames // 2
    frame = next((frame for number, frame in video.frames_from(middle) if number >= middle), None)
    if frame is None:
        raise DecodeError(CORRUPT)
    return _pixels(frame, *_display_size(frame))


def check_decodable(data: bytes) -> None:
    """Decode all of a video. Raises Undecodable where a part of it could not be."""
    video = _Video(data)
    if not sum(1 for _ in video.frames_from(0)):
        raise DecodeError(CORRUPT)


def require_pyav() -> None:
    """Raise InvalidInputError where PyAV is missing."""
    if importlib.util.find_spec("av") is None:
        raise InvalidInputError("SEMI-E063", "frames: Videos need PyAV, which is not installed. Run `pip install av`.")


def resize_short_side(preprocessing: Preprocessing) -> int:
    """Return what the short side of a frame is resized to before it is cut, in pixels."""
    return round(preprocessing.resolution * SHORT_SIDE_RATIO)


def uniform_clip_starts(frames: int, length: int) -> NDArray[np.int64]:
    """Return where CLIPS clips of a length start in a video: equally far apart, the first and the last at its ends."""
    return np.linspace(0, max(frames - length, 0), EVAL_CLIPS).round().astype(np.int64)


def random_clip_start(frames: int, length: int, random: float) -> int:
    """Return where a clip starts in a video, all places that leave it whole equally likely; takes a uniform number."""
    return int(random * (max(frames - length, 0) + 1))


def detect_container(data: bytes) -> str:
    """Name a video's container by its first bytes; "" for what is no video."""
    container = _container(data)
    return container.suffix if container else ""


def _crop_frames(
    video: "_Video", wanted: NDArray[np.int64], preprocessing: Preprocessing, place: tuple[float, float]
) -> Clip:
    """Return the frames of these numbers, resized and cut; what is beyond the last frame is the last frame."""
    numbers, last = set(wanted.ravel().tolist()), int(wanted.max())
    cuts: dict[int, ImageArray] = {}
    frame = number = None
    for number, frame in video.frames_from(int(wanted.min())):
        if number in numbers:
            cuts[number] = _crop_frame(frame, preprocessing, place)
        if number >= last:
            break
    if frame is None or number is None:
        raise DecodeError(CORRUPT)
    end = cuts.get(number)
    end = _crop_frame(frame, preprocessing, place) if end is None else end
    return np.stack([cuts.get(one, end) for one in wanted.ravel().tolist()]).reshape(*wanted.shape, *end.shape)


def _crop_frame(frame: "VideoFrame", preprocessing: Preprocessing, place: tuple[float, float]) -> ImageArray:
    size, short = preprocessing.resolution, resize_short_side(preprocessing)
    height, width = _display_size(frame)
    scale = short / min(height, width)
    resized = _pixels(frame, max(round(height * scale), size), max(round(width * scale), size))
    top, left = (int(at * (there - size + 1)) for at, there in zip(place, resized.shape[:2], strict=True))
    return resized[top : top + size, left : left + size]


def _display_size(frame: "VideoFrame") -> tuple[int, int]:
    """Return a frame's height and width as it is shown: telephones store theirs lying on the side."""
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def _pixels(frame: "VideoFrame", height: int, width: int) -> ImageArray:
    """Return a frame as RGB of a size, upright; FFmpeg's bilinear filter is as wide as the reduction: no aliasing."""
    _refuse_size(frame.width, frame.height)
    turns = frame.rotation // 90
    size = {"width": height, "height": width} if turns % 2 else {"width": width, "height": height}
    rgb = frame.reformat(**size, format="rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, turns))


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"frames of more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DecodeError(f"frames more than {MAX_ASPECT_RATIO} times as long as wide")


class _Video:
    """A video whose packets are known and not decoded yet. `frames` is how many are stored."""

    def __init__(self, data: bytes) -> None:
        container = _container(data)
        if container is None:
            raise DecodeError("not a video")
        if container.end(data) > len(data):
            raise DecodeError(TRUNCATED)
        self._stream, self._packets = _opened(data, container.format)
        times = [packet.pts for packet in self._packets]
        told = container.tells_times and None not in times and len(set(times)) == len(times)
        self._number = {time: number for number, time in enumerate(sorted(times))} if told else {}
        self.frames = len(self._packets)
        if not self.frames:
            raise DecodeError(CORRUPT)
        if self.frames > MAX_FRAMES:
            raise DecodeError(f"more than {MAX_FRAMES} frames")
        if self._stream.frames > self.frames:
            raise DecodeError(TRUNCATED)

    def frames_from(self, start: int) -> Iterator[tuple[int, "VideoFrame"]]:
        """Yield frames with their numbers, in order, from number `start` or before. Raises Undecodable. Once only."""
        from av.error import FFmpegError

        number = -1
        try:
            for frame in self._decoded(self._packets[self._keyframe_before(start) :]):
                number = self._number.get(frame.pts, number + 1)
                yield number, frame
        except FFmpegError:
            raise DecodeError(CORRUPT) from None

    def _keyframe_before(self, start: int) -> int:
        """Return the place of the last keyframe that is shown at frame `start` or before it.

        What is shown after a keyframe needs no packet that is stored before it.
        """
        keys = (
            place
            for place, packet in enumerate(self._packets)
            if packet.is_keyframe and self._number and self._number[packet.pts] <= start
        )
        return max(keys, default=0)

    def _decoded(self, packets: "Iterable[av.Packet[Any]]") -> Iterator["VideoFrame"]:
        for packet in packets:
            yield from self._whole(packet.decode())
        yield from self._whole(self._stream.codec_context.decode(None))

    @staticmethod
    def _whole(frames: Iterable[Any]) -> Iterator["VideoFrame"]:
        for frame in frames:
            if frame.is_corrupt:
                raise DecodeError(CORRUPT)
            yield frame


def _opened(data: bytes, kind: str) -> tuple[Any, list[Any]]:
    """Return a video's stream and its packets, in stored order."""
    import av  # a third of a second, for those who have videos

    try:
        container = av.open(io.BytesIO(data), "r", format=kind)
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise DecodeError("no video in it, but sound")
        codec = stream.codec_context
        if codec is None or codec.codec.canonical_name not in CODECS:
            raise DecodeError("a codec that is not read")
        _refuse_size(codec.width, codec.height)
        codec.thread_count = 1  # videos are decoded side by side
        return stream, [packet for packet in container.demux(stream) if packet.size]
    except (DecodeError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - as Pillow's, FFmpeg's readers report damage in every way there is
        raise DecodeError(CORRUPT) from None


def _end_of_riff(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _end_of_boxes(data: bytes) -> int:
    """Return where the last of an MP4's boxes ends by its own size (ISO/IEC 14496-12, 4.2)."""
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        if size == 1:
            size = int.from_bytes(data[end + 8 : end + 16], "big")
        if size < 8:  # 0: to the end of the file
            return len(data)
        end += size
    return end


def _end_of_segment(data: bytes) -> int:
    """Return where a Matroska file's segment ends by its own size (RFC 8794); one that is streamed does not say."""
    header, header_size = _element_size(data, 4)
    segment, size = _element_size(data, header + header_size + 4)
    return segment + size


def _element_size(data: bytes, at: int) -> tuple[int, int]:
    """Read a variable-length size; returns where the content begins, and its size, 0 where that is not known."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    size = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return at + length, 0 if size == (1 << 7 * length) - 1 else size


class _Container(NamedTuple):
    """A container: how it begins, where it ends by its own account, and whether it says when each packet is shown."""

    suffix: str
    format: str  # FFmpeg's name
    beginning: re.Pattern[bytes]
    end: Callable[[bytes], int]
    tells_times: bool = True


_CONTAINERS = (
    _Container("avi", "avi", re.compile(rb"RIFF....AVI ", re.DOTALL), _end_of_riff, tells_times=False),
    _Container("mp4", "mov", re.compile(rb"....(ftyp|moov|mdat|wide|free)", re.DOTALL), _end_of_boxes),
    _Container("mkv", "matroska", re.compile(rb"\x1aE\xdf\xa3"), _end_of_segment),
)


def _container(data: bytes) -> _Container | None:
    return next((one for one in _CONTAINERS if one.beginning.match(data)), None)
