"""Test the teacher on a CPU, and how pods agree on an execution mode.

Scores must be the same on any number of threads and with several batches in flight.
"""

import re
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from semiscale import storage
from semiscale.common.errors import SemiscaleError
from semiscale.data.preprocessing import Preprocessing
from semiscale.models import networks
from semiscale.models.execution_mode import ExecutionMode, load_or_decide
from semiscale.stages.score import scorer as scoring

NUM_KEPT = 3


def score_images(images_BHWC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score images in batches that are in flight together."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(resolution=images_BHWC.shape[1], augmentation="shift")
    scorer = scoring.make_scorer(
        torch.device("cpu"), networks.build_model("resnet8_small", 5), preprocessing, NUM_KEPT, ""
    )
    starts = range(0, len(images_BHWC), scorer.batch_size)
    results = [scorer.submit(np.ascontiguousarray(images_BHWC[start : start + scorer.batch_size])) for start in starts]
    labels, scores = zip(*(result() for result in results), strict=True)
    return torch.cat(labels), torch.cat(scores)


def test_scores_are_equal_to_the_bit_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (6 * scoring.CPU_BATCH_OF_TINY, 16, 16, 3), np.uint8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    labels_BP, scores_BP = score_images(images_BHWC)
    assert labels_BP.shape == scores_BP.shape == (len(images_BHWC), NUM_KEPT)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    again = score_images(images_BHWC)
    assert torch.equal(labels_BP, again[0])
    assert torch.equal(scores_BP, again[1])
    order = np.random.default_rng(1).permutation(len(images_BHWC))
    shuffled = score_images(images_BHWC[order])
    assert torch.equal(scores_BP[torch.from_numpy(order)], shuffled[1]), "the other images of a batch change nothing"


def test_an_error_in_a_batch_is_raised_with_its_result() -> None:
    preprocessing = Preprocessing(resolution=16, augmentation="shift")
    scorer = scoring.make_scorer(
        torch.device("cpu"), networks.build_model("resnet8_small", 5), preprocessing, NUM_KEPT, ""
    )
    result = scorer.submit(np.zeros((2, 16, 16, 4), np.uint8))
    with pytest.raises(RuntimeError):
        result()


def decide_mode(number: int) -> ExecutionMode:
    """Return the mode that a pod would choose."""
    return ExecutionMode(layout=number % 2, compiled=number % 3 == 0, on=f"card {number}")


def test_pods_that_start_together_follow_one_decision(tmp_path: Path) -> None:
    start = threading.Barrier(12)

    def load_mode(number: int) -> ExecutionMode:
        start.wait()
        return load_or_decide(str(tmp_path), f"card {number}", partial(decide_mode, number))

    with ThreadPoolExecutor(12) as pods:
        modes = list(pods.map(load_mode, range(12)))
    assert len(set(map(repr, modes))) == 1
    assert modes[0] in map(decide_mode, range(12))


def test_a_later_pod_decides_nothing_and_logs_another_card(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_or_decide(bucket, "card 3", partial(decide_mode, 3)) == decide_mode(3)
    assert load_or_decide(bucket, "card 3", lambda: pytest.fail("the mode was decided before")) == decide_mode(3)
    assert "differ" not in capsys.readouterr().out
    assert load_or_decide(bucket, "card 4", partial(decide_mode, 4)) == decide_mode(3)
    assert "this pod has card 4, but card 3 scored before it: equal images may differ" in capsys.readouterr().out
    assert [entry.uri for entry in storage.list_objects(bucket)] == [f"{bucket}/decision.json"]


def make_scoring_module() -> tuple[scoring.ScoringModule, torch.Tensor]:
    preprocessing = Preprocessing(resolution=16, augmentation="shift")
    torch.manual_seed(0)
    scorer = scoring.ScoringModule(networks.build_model("resnet8_small", 5), preprocessing, NUM_KEPT, bf16=False).eval()
    images_BHWC = torch.randint(0, 256, (8, 16, 16, 3), generator=torch.Generator().manual_seed(1))
    return scorer, images_BHWC.to(torch.uint8)


@pytest.mark.parametrize("layout", [0, 1])
def test_the_network_runs_in_the_memory_format_that_was_decided(layout: int) -> None:
    scorer, images_BHWC = make_scoring_module()
    chosen = ExecutionMode(layout=layout, compiled=False, on="")
    with torch.inference_mode():
        for tried_layout in (0, 1):
            mode = ExecutionMode(layout=tried_layout, compiled=False, on="")
            assert scoring.time_scoring(scorer, images_BHWC, mode) > 0
        again = scoring.apply_mode(chosen, scorer, images_BHWC)(images_BHWC)
        first = scoring.apply_mode(chosen, *make_scoring_module())(images_BHWC)
    assert scorer.memory_format == (torch.channels_last, torch.contiguous_format)[layout]
    assert torch.equal(first[1], again[1]), "modes that were timed before leave no trace"


def decide_without_compiler() -> tuple[bool, str]:
    """Return whether a pod chooses to compile, and its error if it has to."""
    scorer, images_BHWC = make_scoring_module()
    with torch.inference_mode():
        compiled = scoring.autotune(scorer, images_BHWC, "a CPU").compiled
        try:
            scoring.apply_mode(ExecutionMode(layout=0, compiled=True, on=""), scorer, images_BHWC)
        except SemiscaleError as error:
            return compiled, str(error)
    return compiled, ""


@pytest.mark.slow
def test_a_pod_without_a_compiler_refuses_a_compiled_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it in another process: torch remembers that there is no compiler."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        compiled, message = pool.submit(decide_without_compiler).result()
    assert not compiled
    assert re.search(r"\[SEMI-E275\]$", message)
