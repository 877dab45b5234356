"""Encode small videos in the usual containers.

A square in the colour of the class moves over noise.
"""

import io
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tests.support.sample_images import CLASSES, write_tar

# The container, codec and options of FFmpeg for each suffix.
FORMATS = {
    "avi": ("avi", "mpeg4", {"g": "6", "bf": "2"}),
    "mp4": ("mp4", "libx264", {"g": "6", "bf": "2"}),
    "mov": ("mov", "mjpeg", {}),
    "mkv": ("matroska", "ffv1", {}),
    "webm": ("webm", "libvpx-vp9", {"g": "6"}),
}


def encode_frames(frames: NDArray[np.uint8], kind: str = "avi") -> bytes:
    """Encode frames_THWC at 25 frames a second."""
    container, codec, options = FORMATS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.bit_rate = 2_000_000
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def number_frames(count: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Return frames_THWC. All pixels of frame t are 6 t + 20."""
    levels = (6 * np.arange(count) + 20).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def draw_video(label: int, seed: int, frames: int = 12, kind: str = "avi") -> bytes:
    """Return a video of a square that moves over still noise.

    The square has the colour of the label. Label -1 has no colour.
    """
    rng = np.random.default_rng([seed, label + 1])
    scene = np.repeat(rng.integers(0, 100, (1, 24, 32, 3), np.uint8), frames, axis=0)
    for time in range(frames):
        left = 2 + time
        scene[time, 6:18, left : left + 12] = 90
        if label >= 0:
            scene[time, 6:18, left : left + 12, label] = 240
    return encode_frames(scene, kind)


def write_run(root: Path, **changes: object) -> dict[str, object]:
    """Write four sets of several kinds, and return the content of a run file."""
    data = root / "data"
    for label, name in enumerate(CLASSES):
        folder = data / "labeled" / name
        folder.mkdir(parents=True)
        for number in range(4):
            kind = ("avi", "mp4")[number % 2]
            (folder / f"{number}.{kind}").write_bytes(draw_video(label, number, kind=kind))
    (data / "classes.txt").write_text("\n".join(CLASSES))
    validation = [(draw_video(label, 100 + number), name) for label, name in enumerate(CLASSES) for number in range(2)]
    pq.write_table(
        pa.table({"image": [video for video, _ in validation], "label": [name for _, name in validation]}),
        data / "v.parquet",
    )
    members: dict[str, bytes] = {}
    for number in range(9):
        members |= {
            f"{number}.mkv": draw_video(number % 3, 200 + number, kind="mkv"),
            f"{number}.cls": b"%d" % (number % 3),
        }
    write_tar(data / "test" / "test.tar", members)
    for shard in range(2):
        pool = {f"{number}.avi": draw_video(number % 4 - 1, 300 + 12 * shard + number) for number in range(12)}
        write_tar(data / "pool" / f"pool-{shard}.tar", pool)
    (data / "pool" / "loose.webm").write_bytes(draw_video(1, 400, kind="webm"))
    in_parquet = [draw_video(number % 3, 500 + number, kind="mp4") for number in range(6)]
    pq.write_table(pa.table({"image": in_parquet}), data / "pool" / "inside.parquet")
    return {
        "name": "trial",
        "workdir": str(root / "work"),
        "labeled": [str(data / "labeled")],
        "validation": [str(data / "v.parquet")],
        "test": [str(data / "test")],
        "unlabeled": [str(data / "pool")],
        "classes": str(data / "classes.txt"),
        "images_per_class": 4,
        "classes_per_image": 3,
        "teacher_architecture": "r2plus1d_8_small",
        "student_architecture": "r2plus1d_8_small",
        "teacher_images_processed": 240,
        "pretrain_images_processed": 240,
        "finetune_epochs": 4,
        "batch_size": 12,
        "device_batch_size": 12,
        "baseline_learning_rates": [0.5],
        "finetune_learning_rates": [0.1],
        "teacher_learning_rate": 1.0,
        "pretrain_learning_rate": 1.0,
        "resolution": 8,
        "frames": 4,
        "pods": 2,
        **changes,
    }
