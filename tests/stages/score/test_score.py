"""Test scoring: log-odds, reuse of finished shard groups, and accounting."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.data import listing
from semiscale.data.preprocessing import Preprocessing
from semiscale.data.shard import SampleFields, Shard
from semiscale.observability import progress
from semiscale.receipts.score import PartImageCounts, PartSeconds, ScoreReceipt, ShardGroupReceipt
from semiscale.scores.score_file import ScoreFileReader
from semiscale.stages.score import shard_scores
from semiscale.stages.score.config import ScoreConfig
from semiscale.stages.score.scanner import _ShardAccumulator
from semiscale.stages.score.score_store import score_set_name
from semiscale.stages.score.scorer import top_class_log_odds
from semiscale.stages.score.shard_loader import SampleInfo, ShardSpan
from semiscale.stages.score.thread_shard_loader import ThreadShardLoader
from semiscale.stages.score.timings import bottleneck_advice
from tests.support import sample_images
from tests.support.stages import Stages


def test_log_odds_match_their_definition_in_double_precision() -> None:
    logits_BC = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)) * 5
    labels_BP, scores_BP = top_class_log_odds(logits_BC, 10)
    exact_BC = logits_BC.double().log_softmax(1)
    expected_BC = exact_BC - torch.log1p(-exact_BC.exp())
    assert torch.equal(labels_BP, logits_BC.topk(10).indices)
    assert torch.allclose(scores_BP.double(), expected_BC.gather(1, labels_BP), atol=1e-4)


def test_log_odds_distinguish_saturated_images() -> None:
    margins = torch.arange(20, 120, 5, dtype=torch.float32)
    logits_BC = torch.stack([torch.tensor([margin, 0.0, 0.0]) for margin in margins])
    assert (logits_BC.softmax(1)[:, 0] == 1).sum() > 15
    scores_B = top_class_log_odds(logits_BC, 1)[1][:, 0]
    assert (scores_B[1:] > scores_B[:-1]).all()
    assert torch.allclose(scores_B, margins - torch.log(torch.tensor(2.0)))


def test_two_classes_keep_both() -> None:
    labels_BP, scores_BP = top_class_log_odds(torch.tensor([[1.0, 3.0]]), 2)
    assert labels_BP.tolist() == [[1, 0]]
    assert scores_BP.tolist() == [[2.0, -2.0]]


def test_every_image_is_scored_or_counted(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    bad = {
        "text.png": b"not an image",
        "cut.png": sample_images.draw_png(0, 1)[:70],
        "none.png": b"",
        "good.png": sample_images.draw_png(1, 2),
        "only.json": b"{}",
    }
    sample_images.write_tar(tmp_path / "data" / "pool" / "bad.tar", bad)
    receipts = stages.scores
    assert sum(receipt.listed for receipt in receipts) == 3 * 40 + 5
    assert sum(receipt.scored for receipt in receipts) == 3 * 40 + 1
    failed = {reason: count for receipt in receipts for reason, count in receipt.failed.items()}
    assert failed == {"not an image": 1, "damaged image": 1, "empty file": 1, "no image members": 1}


def test_an_image_of_one_pixel_by_a_million_is_scored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (1, 1_000_000)).save(buffer, "PNG")
    stages = Stages(tmp_path)
    sample_images.write_tar(tmp_path / "data" / "pool" / "thin.tar", {"thin.png": buffer.getvalue()})
    assert sum(receipt.scored for receipt in stages.scores) == 3 * 40 + 1


def test_finished_groups_are_reused_without_loading_the_teacher(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    first = stages.score(0)
    assert (first.scored, first.units_found) == (120, 0), "a pod that runs alone scores all shard groups"
    Path(stages.teacher.checkpoint).unlink()
    again = stages.score(0)
    assert (again.units_found, again.scored) == (first.units, first.scored)
    other = stages.score(1)
    assert (other.units, other.scored) == (0, 0)


def test_only_a_changed_shard_is_scored_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    assert len(stages.scores) == stages.plan.pods
    sample_images.write_tar(tmp_path / "data" / "pool" / "pool-001.tar", {"other.png": sample_images.draw_png(0, 1)})
    again = Stages.on(stages.config, tmp_path)
    again.__dict__["teacher"] = stages.teacher
    capsys.readouterr()
    assert sum(receipt.listed for receipt in again.scores) == 2 * 40 + 1
    log = capsys.readouterr().out
    assert "pool-001.tar: 1 images scored" in log
    assert "pool-000.tar" not in log


def test_number_of_pods_matches_the_remaining_work(tmp_path: Path) -> None:
    """Check that the number of pods is that of unscored shards or unfinished groups.

    An earlier attempt may have left some of the scores.
    """
    first = Stages(tmp_path, pods=3)
    assert [pod.pod for pod in first.scores] == [0, 1, 2]
    folder = Path(first.scores[0].folder)
    reasons = []
    for lost, count in (("nothing", 0), ("*/receipt.json", 2), ("parts/*.parquet", 1), ("parts/*.parquet", 2)):
        paths = sorted(folder.glob(lost))[:count]
        assert len(paths) == count
        for path in paths:
            path.unlink()
        again = Stages.on(first.config, tmp_path)
        reasons.append(again.unscored.why)
    assert reasons == [
        "1 of 3 pods: 0 of 3 shards to score, 0 of 2 shard groups to rank",
        "2 of 3 pods: 0 of 3 shards to score, 2 of 2 shard groups to rank",
        "2 of 3 pods: 1 of 3 shards to score, 2 of 2 shard groups to rank",
        "3 of 3 pods: 3 of 3 shards to score, 2 of 2 shard groups to rank",
    ]
    assert sum(pod.scored for pod in again.scores) == 120


def rows_by_image(receipts: list[ScoreReceipt]) -> set[tuple[str, int, int, float]]:
    """Return all rows of all shard groups as (shard name, index, class, score)."""
    rows = set()
    for path in Path(receipts[0].folder).glob("*/scores.parquet"):
        names = ScoreFileReader(str(path)).shard_names
        for row in pq.read_table(path).to_pylist():
            rows.add((names[row["sample"] >> 32], row["sample"] & 0xFFFFFFFF, row["class"], row["score"]))
    return rows


def test_a_small_validation_set_is_named_in_the_log_before_the_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = Stages(tmp_path)
    assert stages.plan.validation.samples < 10 * len(stages.plan.classes)
    assert stages.unscored.pods
    assert "score · warning: The validation set has" in capsys.readouterr().out


def test_scores_do_not_depend_on_the_number_of_pods(tmp_path: Path) -> None:
    one_pod, three_pods = (rows_by_image(Stages(tmp_path / str(pods), pods=pods).scores) for pods in (1, 3))
    assert len(one_pod) == 120 * 3
    assert one_pod == three_pods


def test_score_folder_names_the_decoder_and_the_image_column() -> None:
    config = ScoreConfig(workdir="w", plan="p", teacher="t", pod=0, images_per_class=1)
    others = ({"decoder": "gpu"}, {"image_column": "thumbnail"}, {"image_column": "top5"})
    default, on_gpu, *columns = (
        score_set_name(config.model_copy(update=changes), "0f", 10) for changes in ({}, *others)
    )
    assert default == "0f-top10"
    assert on_gpu == "0f-top10-gpu-decoded"
    assert len({default, on_gpu, *columns}) == 4
    assert {name.rpartition("-top")[0] for name in columns} == {"0f"}, "the name begins with the teacher"


def test_a_group_receipt_names_shards_and_failures(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    sample_images.write_tar(tmp_path / "data" / "pool" / "bad.tar", {"text.png": b"not an image"})
    folders = {receipt.folder for receipt in stages.scores}
    receipts = [ShardGroupReceipt(**json.loads(path.read_text())) for path in Path(folders.pop()).rglob("receipt.json")]
    assert sum(receipt.images.read for receipt in receipts) == 121
    assert sum(receipt.images.write for receipt in receipts) == sum(receipt.scored for receipt in receipts) == 120
    assert {receipt.slowest for receipt in receipts} & PartSeconds.model_fields.keys()
    failures = [failure for receipt in receipts for failure in receipt.failures]
    assert [(failure.shard, failure.key, failure.reason) for failure in failures] == [
        ("bad.tar", "text", "not an image")
    ]


def test_a_teacher_with_other_classes_is_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.__dict__["teacher"] = stages.teacher.model_copy(update={"classes": ["a", "b", "c"], "digest": "0"})
    with pytest.raises(InvalidInputError, match=r"SEMI-E270"):
        stages.score(0)


@pytest.mark.parametrize(
    ("clocks", "slowest"),
    [
        (PartSeconds(read=1, decode=7, forward=2), "forward-bound: use a faster device, or add pods"),
        (PartSeconds(read=1, decode=9, forward=2), "decode-bound: add CPUs"),
        (PartSeconds(read=4, decode=9, forward=2), "read-bound: add pods, or use a store nearer by"),
        (PartSeconds(read=4, decode=9, forward=2, write=5), "write-bound: add pods, or use a store nearer by"),
        (PartSeconds(), "nothing waited for"),
    ],
)
def test_the_log_names_the_resource_that_relieves_the_bottleneck(clocks: PartSeconds, slowest: str) -> None:
    assert bottleneck_advice(clocks, threads=4) == slowest


def test_scores_that_are_not_finite_are_counted() -> None:
    samples = [SampleInfo(number, f"k{number}", "a.tar", 0, 1, True, "", 0.0) for number in range(3)]
    shard = Shard(uri="a.tar", name="a.tar", kind="tar", size_bytes=3, version="")
    accumulator = _ShardAccumulator(shard)
    scores_BP = torch.tensor([[1.0, 0.5], [torch.nan, torch.nan], [torch.inf, 0.0]])
    accumulator.add(ShardSpan(shard, 0, samples, 0.0, True, 3), (torch.zeros(3, 2, dtype=torch.int64), scores_BP), 0.0)
    scores = accumulator.to_shard_scores(2, 3, 0.0)
    assert (scores.count.listed, scores.count.scored) == (3, 1)
    assert scores.count.images == PartImageCounts(read=3, decode=3, forward=3, write=1)
    assert scores.count.failed == {"the teacher's scores are not finite": 2}
    assert scores.scores_BP.tolist() == [[1.0, 0.5]]
    with pytest.raises(SemiscaleError, match=r"shard a\.tar: .*SEMI-E179"):
        accumulator.to_shard_scores(2, 4, 0.0)


def test_samples_are_counted_when_they_are_read(tmp_path: Path) -> None:
    pool = sample_images.write_pool(tmp_path, 2, 10)
    loader = ThreadShardLoader(
        Preprocessing(resolution=8, augmentation="shift"), SampleFields(), np.zeros((6, 4, 8, 8, 3), np.uint8), 2, 2
    )
    listed = []
    for batch in loader.batches(listing.list_shards([str(pool)])):
        listed += [span.listed for span in batch.spans if span.is_last]
        loader.release(batch.slot)
    assert listed == [10, 10]


def test_stored_scores_that_lack_a_sample_are_refused_by_name(tmp_path: Path) -> None:
    stages = Stages(tmp_path, pods=1)
    folder = Path(stages.score(0).folder)
    victim = sorted((folder / "parts").iterdir())[0]
    teacher = stages.teacher.digest
    complete = shard_scores.shard_scores_from_parquet(victim.read_bytes(), str(victim), teacher)
    short = replace(
        complete,
        samples=complete.samples[1:],
        labels_BP=complete.labels_BP[1:],
        scores_BP=complete.scores_BP[1:],
    )
    victim.write_bytes(short.to_parquet(teacher))
    for receipt in folder.glob("*/receipt.json"):
        receipt.unlink()
    message = rf"{victim}: .* 39 samples of shard {complete.count.shard}, expected 40.*SEMI-E273"
    with pytest.raises(SemiscaleError, match=message):
        stages.score(0)
    victim.unlink()
    assert stages.score(0).scored == 120


def test_the_progress_line_of_a_scan_ends_near_the_whole_pool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    for shard in range(6):
        members = {f"{number}.png": sample_images.draw_png(number % 3, number, size=64) for number in range(64)}
        sample_images.write_tar(tmp_path / "large" / f"{shard}.tar", members)
    stages = Stages(tmp_path, unlabeled=[str(tmp_path / "large")], pods=2)
    assert stages.teacher
    capsys.readouterr()
    stages.score(0)
    line = r"images · .*/s · (\d+)% of this pod's share · (\d+)% of the pool · \d+:\d\d left"
    percentages = [(int(share), int(pool)) for share, pool in re.findall(line, capsys.readouterr().out)]
    assert len(percentages) >= 6
    assert percentages == sorted(percentages)
    assert 0 < percentages[0][1] < 50
    assert all(abs(share - 2 * pool) <= 1 for share, pool in percentages), (
        "a pod that runs alone scores the shares of both pods"
    )
    assert percentages[-1][1] > 90
