"""The teacher on a CPU: the same scores on any number of threads, from batches in flight together."""

import numpy as np
import pytest
import torch

from components.score import forward
from components.shared import models
from components.shared.receipts import Preprocessing

KEPT = 3


def found(images_BHWC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    preprocessing = Preprocessing(resolution=images_BHWC.shape[1], augmentation="shift")
    on = forward.on(torch.device("cpu"), models.build("resnet8_small", 5), preprocessing, KEPT)
    starts = range(0, len(images_BHWC), on.batch_size)
    results = [on.start(np.ascontiguousarray(images_BHWC[start : start + on.batch_size])) for start in starts]
    labels, scores = zip(*(result() for result in results), strict=True)
    return torch.cat(labels), torch.cat(scores)


def test_scores_are_the_same_to_the_bit_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (6 * forward.CPU_BATCH_OF_TINY, 16, 16, 3), np.uint8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    labels_BP, scores_BP = found(images_BHWC)
    assert labels_BP.shape == scores_BP.shape == (len(images_BHWC), KEPT)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    again = found(images_BHWC)
    assert torch.equal(labels_BP, again[0])
    assert torch.equal(scores_BP, again[1])
    order = np.random.default_rng(1).permutation(len(images_BHWC))
    shuffled = found(images_BHWC[order])
    assert torch.equal(scores_BP[torch.from_numpy(order)], shuffled[1]), "whatever else was in the batch"


def test_an_error_in_a_batch_is_raised_where_its_result_is_asked_for() -> None:
    preprocessing = Preprocessing(resolution=16, augmentation="shift")
    on = forward.on(torch.device("cpu"), models.build("resnet8_small", 5), preprocessing, KEPT)
    result = on.start(np.zeros((2, 16, 16, 4), np.uint8))
    with pytest.raises(RuntimeError):
        result()
