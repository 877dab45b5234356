"""Test the evaluation loader: batches, prefetching and images in memory."""

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
from tests.support.sample_images import write_photographs
from tests.support.stages import Stages
from tests.support.threads import wait_for_prefetch_threads

SETTINGS = Preprocessing(resolution=16, augmentation="crop-flip")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a planned run whose test set is 60 photographs in six tars."""
    root = tmp_path_factory.mktemp("run")
    return Stages(root, test=write_photographs(root / "photographs", 6, 10))


def make_loader(stages: Stages, monkeypatch: pytest.MonkeyPatch, batch: int = 7, cache_bytes: int = 0) -> EvalLoader:
    """Return a loader of the test set.

    Args:
        stages: The run.
        monkeypatch: Sets the constants of the loader.
        batch: Images per batch.
        cache_bytes: The size of the cache. By default, it holds no image.
    """
    monkeypatch.setattr(inference, "BATCH", batch)
    monkeypatch.setattr(inference, "CACHE_BYTES", cache_bytes)
    return EvalLoader(stages.plan.test, SampleFields(), SETTINGS)


def decode_one_by_one(stages: Stages) -> list[Batch]:
    """Return the views of all images in the order of the tars."""
    shards = load_split(stages.plan.test)
    return [
        eval_transforms.eval_view(sample.image, SETTINGS)
        for shard in shards
        for sample, _ in shard.iter_samples(SampleFields())
    ]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("batch", [1, 7, 60, 256])
def test_batches_have_all_images_in_order(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, batch: int, cache_bytes: int
) -> None:
    loader, expected = make_loader(stages, monkeypatch, batch, cache_bytes), decode_one_by_one(stages)
    # The next model reads the same images again.
    for _ in range(2):
        batches = list(loader.batches())
        assert [len(batch_BHWC) for batch_BHWC in batches] == [min(batch, 60 - start) for start in range(0, 60, batch)]
        assert np.array_equal(np.concatenate(batches), np.stack(expected))
    wait_for_prefetch_threads()


def test_cached_images_and_images_that_are_read_again_have_the_same_logits(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = networks.build_model("resnet8_small", 3).train()
    cached, read_again = (
        predict_logits(model, make_loader(stages, monkeypatch, 7, size), CPU) for size in (1 << 30, 0)
    )
    assert torch.equal(cached, read_again)
    assert model.training


def test_a_bounded_number_of_images_is_decoded_in_advance(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    # The caller has a batch of four. One batch is ready, one is being made, and each thread has two parts in flight.
    decoded: list[int] = []
    view = eval_transforms.eval_view

    def count_view(image: bytes, preprocessing: Preprocessing) -> Batch:
        decoded.append(len(image))
        return view(image, preprocessing)

    monkeypatch.setattr(inference, "DECODE_CHUNK", 1)
    monkeypatch.setattr(inference, "available_cpus", lambda: 2)
    monkeypatch.setattr(eval_transforms, "eval_view", count_view)
    batches = make_loader(stages, monkeypatch, batch=4).batches()
    next(batches)
    deadline = time.monotonic() + 60
    while len(decoded) < 3 * 4:
        assert time.monotonic() < deadline, "the second and the third batch must be decoded before they are requested"
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(decoded) <= 3 * 4 + 2 * 2 + 1
    batches.close()
    wait_for_prefetch_threads()
    assert len(decoded) < 30, "no thread may decode after the close"


def test_an_image_that_can_no_longer_be_read_is_named(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loader = make_loader(stages, monkeypatch)
    broken = loader._shards[3]
    data = bytearray(storage.read_bytes(broken.shard.uri))
    header = data.index(b"\xff\xd8\xff")
    data[header : header + 3] = b"\0\0\0"
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    loader._shards[3] = type(broken)(broken.shard.model_copy(update={"uri": str(path), "version": ""}), broken.labels)
    model = networks.build_model("resnet8_small", 3).train()
    counted: list[int] = []
    with pytest.raises(SemiscaleError, match=r"broken.tar.*: 00030: .*SEMI-E154"):
        predict_logits(model, loader, CPU, counted.append)
    assert sum(counted) == 28, "the batches before the image were counted"
    assert model.training, "the model must be in its earlier mode"
    wait_for_prefetch_threads()
