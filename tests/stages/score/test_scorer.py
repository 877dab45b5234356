"""The teacher on a CPU: the same scores on any number of threads, from batches in flight together; how pods agree on
what is decided by trying, as far as a CPU can show it.
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

KEPT = 3


def found(images_BHWC: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    preprocessing = Preprocessing(resolution=images_BHWC.shape[1], augmentation="shift")
    on = scoring.make_scorer(torch.device("cpu"), networks.build_model("resnet8_small", 5), preprocessing, KEPT, "")
    starts = range(0, len(images_BHWC), on.batch_size)
    results = [on.submit(np.ascontiguousarray(images_BHWC[start : start + on.batch_size])) for start in starts]
    labels, scores = zip(*(result() for result in results), strict=True)
    return torch.cat(labels), torch.cat(scores)


def test_scores_are_the_same_to_the_bit_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (6 * scoring.CPU_BATCH_OF_TINY, 16, 16, 3), np.uint8)
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
    on = scoring.make_scorer(torch.device("cpu"), networks.build_model("resnet8_small", 5), preprocessing, KEPT, "")
    result = on.submit(np.zeros((2, 16, 16, 4), np.uint8))
    with pytest.raises(RuntimeError):
        result()


def tried(number: int) -> ExecutionMode:
    """What a pod would decide for itself."""
    return ExecutionMode(layout=number % 2, compiled=number % 3 == 0, on=f"card {number}")


def test_pods_that_start_together_follow_one_decision(tmp_path: Path) -> None:
    start = threading.Barrier(12)

    def decision_of(number: int) -> ExecutionMode:
        start.wait()
        return load_or_decide(str(tmp_path), f"card {number}", partial(tried, number))

    with ThreadPoolExecutor(12) as pods:
        found = list(pods.map(decision_of, range(12)))
    assert len(set(map(repr, found))) == 1
    assert found[0] in map(tried, range(12))


def test_a_later_pod_tries_nothing_and_says_where_its_card_is_another(
    bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_or_decide(bucket, "card 3", partial(tried, 3)) == tried(3)
    assert load_or_decide(bucket, "card 3", lambda: pytest.fail("decided before")) == tried(3)
    assert "differ" not in capsys.readouterr().out
    assert load_or_decide(bucket, "card 4", partial(tried, 4)) == tried(3)
    assert "this pod has card 4, but card 3 scored before it: equal images may differ" in capsys.readouterr().out
    assert [entry.uri for entry in storage.list_objects(bucket)] == [f"{bucket}/decision.json"]


def scorer_on_cpu() -> tuple[scoring.ScoringModule, torch.Tensor]:
    preprocessing = Preprocessing(resolution=16, augmentation="shift")
    torch.manual_seed(0)
    scorer = scoring.ScoringModule(networks.build_model("resnet8_small", 5), preprocessing, KEPT, bf16=False).eval()
    images_BHWC = torch.randint(0, 256, (8, 16, 16, 3), generator=torch.Generator().manual_seed(1))
    return scorer, images_BHWC.to(torch.uint8)


@pytest.mark.parametrize("layout", [0, 1])
def test_the_network_runs_in_the_memory_format_that_was_decided(layout: int) -> None:
    scorer, images_BHWC = scorer_on_cpu()
    decision = ExecutionMode(layout=layout, compiled=False, on="")
    with torch.inference_mode():
        for tried_layout in (0, 1):
            mode = ExecutionMode(layout=tried_layout, compiled=False, on="")
            assert scoring.time_scoring(scorer, images_BHWC, mode) > 0
        again = scoring.apply_mode(decision, scorer, images_BHWC)(images_BHWC)
        first = scoring.apply_mode(decision, *scorer_on_cpu())(images_BHWC)
    assert scorer.memory_format == (torch.channels_last, torch.contiguous_format)[layout]
    assert torch.equal(first[1], again[1]), "what was tried before leaves no trace"


def without_a_compiler() -> tuple[bool, str]:
    """Return whether a pod decides for compiling, and how it refuses to follow one that did."""
    scorer, images_BHWC = scorer_on_cpu()
    with torch.inference_mode():
        compiled = scoring.autotune(scorer, images_BHWC, "a CPU").compiled
        try:
            scoring.apply_mode(ExecutionMode(layout=0, compiled=True, on=""), scorer, images_BHWC)
        except SemiscaleError as error:
            return compiled, str(error)
    return compiled, ""


@pytest.mark.slow
def test_a_pod_without_a_compiler_does_not_score_beside_compiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: torch remembers that there is no compiler."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        compiled, refusal = pool.submit(without_a_compiler).result()
    assert not compiled
    assert re.search(r"\[SEMI-E275\]$", refusal)
