"""Test the decoding of clips in every container, and reasons for failures."""

import io
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from semiscale.data import video_decoding
from semiscale.data.eval_transforms import eval_view
from semiscale.data.image_decoding import DecodeError
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.video_decoding import (
    decode_eval_clips,
    decode_middle_frame,
    decode_train_clip,
    random_clip_start,
    uniform_clip_starts,
)
from tests.support import videos

CLIPS = Preprocessing(resolution=14, augmentation="crop-flip", frames=4)
REAL_CLIPS = Path(os.environ.get("SEMISCALE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "clips"


def frame_numbers(clip: np.ndarray) -> np.ndarray:
    """Return the number of each frame of a clip of `videos.number_frames`."""
    return np.asarray(np.round((clip.astype(float).mean((-3, -2, -1)) - 20) / 6).astype(int))


def decode_all_frames(data: bytes, start: int, length: int) -> np.ndarray:
    """Decode every frame of a video and return those of a clip."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[min(start + time, len(frames) - 1)] for time in range(length)])


@pytest.mark.parametrize("kind", videos.FORMATS)
def test_ten_uniform_clips_have_the_expected_frames(kind: str) -> None:
    # Section 5.1 of the paper takes ten clips with uniform spacing.
    clips = decode_eval_clips(videos.encode_frames(videos.number_frames(31), kind), CLIPS)
    assert clips.shape == (10, 4, 14, 14, 3)
    assert frame_numbers(clips).tolist() == [[start + time for time in range(4)] for start in range(0, 28, 3)]


@pytest.mark.parametrize("kind", videos.FORMATS)
@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 13, 26])
def test_a_seek_to_the_keyframe_equals_decoding_all_frames(kind: str, start: int) -> None:
    data = videos.encode_frames(videos.number_frames(30), kind)
    clip = decode_train_clip(data, CLIPS, np.array([(start + 0.5) / 27, 0.5, 0.5]))
    assert (
        frame_numbers(clip).tolist()
        == frame_numbers(decode_all_frames(data, start, 4)).tolist()
        == list(range(start, start + 4))
    )


@pytest.mark.parametrize("kind", videos.FORMATS)
def test_a_short_video_repeats_its_last_frame(kind: str) -> None:
    data = videos.encode_frames(videos.number_frames(3), kind)
    assert frame_numbers(decode_eval_clips(data, CLIPS)).tolist() == [[0, 1, 2, 2]] * 10
    assert frame_numbers(decode_train_clip(data, CLIPS, np.full(3, 0.99))).tolist() == [0, 1, 2, 2]


def test_clip_starts_are_uniform_and_random_ones_leave_the_clip_whole() -> None:
    assert uniform_clip_starts(100, 10).tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert uniform_clip_starts(7, 8).tolist() == [0] * 10
    assert {random_clip_start(12, 8, random) for random in np.linspace(0, 0.9999, 100)} == {0, 1, 2, 3, 4}
    assert random_clip_start(3, 8, 0.9999) == 0


def test_frames_are_resized_to_128_and_cropped_to_112() -> None:
    # Supplement 4.2 resizes frames to 128 x 171. Training takes a random crop of 112 x 112, evaluation the center.
    ramp = np.broadcast_to(np.linspace(0, 255, 320)[None, None, :, None], (8, 240, 320, 3)).astype(np.uint8)
    paper = Preprocessing(resolution=112, augmentation="crop-flip", frames=8)
    data = videos.encode_frames(ramp, "mkv")
    # The center crop has the middle 112 of 171 columns.
    expected = 255 * (29 + 0.5 + np.arange(112)) / 171
    assert np.abs(decode_eval_clips(data, paper)[0, 0, 50, :, 0] - expected).max() < 3
    left, right = (decode_train_clip(data, paper, np.array([0.5, 0.5, offset])) for offset in (0.0, 0.999))
    assert np.abs(left[0, 50, :, 0] - 255 * (0.5 + np.arange(112)) / 171).max() < 3
    assert np.abs(right[0, 50, :, 0] - 255 * (59.5 + np.arange(112)) / 171).max() < 3
    assert np.array_equal(left, decode_train_clip(data, paper, np.array([0.5, 0.5, 0.0])))


def test_the_rotation_of_a_phone_video_is_applied() -> None:
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    # The left half is white. After a clockwise rotation, it is the upper half.
    frames[:, :, :32] = 255
    data = bytearray(videos.encode_frames(frames, "mp4"))
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    shown = decode_middle_frame(bytes(data))
    assert shown.shape == (64, 48, 3)
    assert shown[:28].min() > 200
    assert shown[36:].max() < 50
    clip = decode_eval_clips(bytes(data), CLIPS)[0, 0]
    assert clip[:5].min() > 200
    assert clip[9:].max() < 50


def test_the_middle_frame_represents_a_video() -> None:
    for kind in videos.FORMATS:
        shown = decode_middle_frame(videos.encode_frames(videos.number_frames(20), kind))
        assert shown.shape == (48, 64, 3)
        assert frame_numbers(shown) == 10


@pytest.mark.parametrize("kind", videos.FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95, 0.999])
def test_a_truncated_video_is_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    data = videos.encode_frames(noise, kind)
    truncated = data[: int(len(data) * share)]
    for decode in (
        video_decoding.check_decodable,
        lambda video: decode_eval_clips(video, CLIPS),
        decode_middle_frame,
    ):
        with pytest.raises(DecodeError, match=r"^(video cut off|damaged video)$"):
            decode(truncated)


@pytest.mark.parametrize("kind", videos.FORMATS)
def test_a_damaged_video_gives_a_reason_or_pixels(kind: str) -> None:
    # No bytes may raise an error other than DecodeError.
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), np.uint8)
    data = np.frombuffer(videos.encode_frames(noise, kind), np.uint8)
    failed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        damaged = data.copy()
        start = int(rng.integers(0, len(data) - 200)) if seed % 2 else int(rng.integers(8, 400))
        damaged[start : start + 200] = rng.integers(0, 255, 200)
        try:
            assert decode_eval_clips(damaged.tobytes(), CLIPS).shape == (10, 4, 14, 14, 3)
        except DecodeError:
            failed += 1
    assert failed > 5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a video"),
        (b"\xff\xd8\xff" + bytes(100), "not a video"),
        (b"#EXTM3U\nfile:///etc/passwd", "not a video"),
        (b"RIFF\x64\0\0\0AVI " + bytes(100), "damaged video"),
        (b"\x1aE\xdf\xa3", "video cut off"),
        (b"\0\0\0\x08ftyp", "damaged video"),
    ],
)
def test_data_that_are_not_a_video_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=f"^{reason}$"):
        eval_view(data, CLIPS)


def test_a_long_or_huge_video_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = videos.encode_frames(videos.number_frames(9), "mp4")
    monkeypatch.setattr(video_decoding, "MAX_FRAMES", 8)
    with pytest.raises(DecodeError, match=r"^more than 8 frames$"):
        decode_eval_clips(data, CLIPS)
    monkeypatch.setattr(video_decoding, "MAX_FRAMES", 9)
    monkeypatch.setattr(video_decoding, "MAX_FRAME_PIXELS", 48 * 64 - 1)
    with pytest.raises(DecodeError, match=r"^frames of more than 3071 pixels$"):
        decode_eval_clips(data, CLIPS)


def test_the_preprocessing_of_images_is_stored_without_frames() -> None:
    images = Preprocessing(resolution=224, augmentation="crop-flip")
    assert list(images.model_dump()) == ["resolution", "augmentation", "mean", "std"]
    assert "frames" not in images.model_dump_json()
    assert Preprocessing.model_validate_json(CLIPS.model_dump_json()) == CLIPS


@pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason="the real clips are not on this machine")
def test_clips_of_real_videos_have_adjacent_frames() -> None:
    paper = Preprocessing(resolution=112, augmentation="crop-flip", frames=8)
    for path in sorted(REAL_CLIPS.glob("labeled/*/*_g1*_c0*.avi"))[:4]:
        clips = decode_eval_clips(path.read_bytes(), paper)
        assert clips.shape == (10, 8, 112, 112, 3)
        # Frames within a clip differ less than the first frames of the clips.
        within_clip = np.abs(np.diff(clips[0].astype(int), axis=0)).mean()
        between_clips = np.abs(np.diff(clips[:, 0].astype(int), axis=0)).mean()
        assert 0 < within_clip < between_clips
