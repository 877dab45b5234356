"""Test the evaluation loader: its batches, its prefetching, and the limit of images in memory."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data import eval_transforms
from semiscale.data.labeled import load_split
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields
from semiscale.data.transforms import Batch
from semiscale.evaluation import inference
from semiscale.evaluation.inference import EvalLoader, predict_logits
from semiscale.models import networks
from tests.common.test_prefetch import waits_for_no_more_threads
from tests.support.pictures import photographs
from tests.support.stages import Stages

SETTINGS = Preprocessing(resolution=16, augmentation="crop-flip")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A planned run whose test set is 60 photographs in six tars."""
    root = tmp_path_factory.mktemp("run")
    return Stages(root, test=photographs(root / "photographs", 6, 10))


def prepared(stages: Stages, monkeypatch: pytest.MonkeyPatch, batch: int = 7, held_bytes: int = 0) -> EvalLoader:
    """The test set, by default too large to be held."""
    monkeypatch.setattr(inference, "BATCH", batch)
    monkeypatch.setattr(inference, "CACHE_BYTES", held_bytes)
    return EvalLoader(stages.plan.test, SampleFields(), SETTINGS)


def one_by_one(stages: Stages) -> list[Batch]:
    """The views of all images, in the order of the tars."""
    shards = load_split(stages.plan.test)
    return [
        eval_transforms.eval_view(sample.image, SETTINGS)
        for shard in shards
        for sample, _ in shard.iter_samples(SampleFields())
    ]


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
@pytest.mark.parametrize("batch", [1, 7, 60, 256])
def test_the_batches_are_the_images_one_by_one(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, batch: int, held_bytes: int
) -> None:
    split, expected = prepared(stages, monkeypatch, batch, held_bytes), one_by_one(stages)
    for _ in range(2):  # the next model sees them again
        batches = list(split.batches())
        assert [len(one) for one in batches] == [min(batch, 60 - start) for start in range(0, 60, batch)]
        assert np.array_equal(np.concatenate(batches), np.stack(expected))
    waits_for_no_more_threads()


def test_what_is_held_and_what_is_read_again_give_the_same_logits(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = networks.build_model("resnet8_small", 3).train()
    held, again = (predict_logits(model, prepared(stages, monkeypatch, 7, size), CPU) for size in (1 << 30, 0))
    assert torch.equal(held, again)
    assert model.training


def test_those_behind_are_decoded_meanwhile_and_no_more_of_them(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has one batch of four; one is ready, one is made, and two parts for every thread are under way."""
    decoded: list[int] = []
    view = eval_transforms.eval_view

    def counted(image: bytes, preprocessing: Preprocessing) -> Batch:
        decoded.append(len(image))
        return view(image, preprocessing)

    monkeypatch.setattr(inference, "DECODE_CHUNK", 1)
    monkeypatch.setattr(inference, "available_cpus", lambda: 2)
    monkeypatch.setattr(eval_transforms, "eval_view", counted)
    batches = prepared(stages, monkeypatch, batch=4).batches()
    next(batches)
    until = time.monotonic() + 60
    while len(decoded) < 3 * 4:
        assert time.monotonic() < until, "nobody asks for the second batch, and it is decoded, and the third"
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(decoded) <= 3 * 4 + 2 * 2 + 1
    batches.close()
    waits_for_no_more_threads()
    assert len(decoded) < 30, "who closes them is not left with threads that go on"


def test_an_image_that_cannot_be_read_any_more_is_named(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    split = prepared(stages, monkeypatch)
    broken = split._shards[3]
    data = bytearray(storage.read_bytes(broken.shard.uri))
    header = data.index(b"\xff\xd8\xff")
    data[header : header + 3] = b"\0\0\0"
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    split._shards[3] = type(broken)(broken.shard.model_copy(update={"uri": str(path), "version": ""}), broken.labels)
    model = networks.build_model("resnet8_small", 3).train()
    counted: list[int] = []
    with pytest.raises(SemiscaleError, match=r"broken.tar.*: 00030: .*SEMI-E154"):
        predict_logits(model, split, CPU, counted.append)
    assert sum(counted) == 28, "the batches before it"
    assert model.training, "the mode that it was in"
    waits_for_no_more_threads()
