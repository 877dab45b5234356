"""Test that shard groups with more images than planned are ranked in pieces."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semiscale.common.errors import SemiscaleError
from semiscale.data.listing import list_shards
from semiscale.data.shard import Shard, ShardGroup
from semiscale.receipts.score import ShardAccounting, ShardGroupReceipt
from semiscale.scores import score_file
from semiscale.stages.plan import shard_groups
from semiscale.stages.score import group_compaction, shard_scores
from semiscale.stages.score.group_compaction import GroupCompactor
from semiscale.stages.score.shard_scores import ShardScores
from tests.support import sample_images
from tests.support.stages import Stages

# One and a half times the number of images that a shard group is planned to have in tests (conftest.py).
MAX_IMAGES = 75


def misleading_pool(root: Path) -> Path:
    """Write 24 tars whose number of images the plan underestimates.

    The tars that the plan samples have two large images each. The others have twenty small images.
    """
    for shard in range(24):
        count, size = (2, 128) if shard % (24 // shard_groups.SAMPLED_SHARDS) == 0 else (20, 8)
        numbers = range(shard * 20, shard * 20 + count)
        members = {f"{number:05}.png": sample_images.draw_png(number % 4 - 1, number, size) for number in numbers}
        sample_images.write_tar(root / f"pool-{shard:03}.tar", members)
    return root


def score_in_workdir(stages: Stages, folder: Path, pods: int) -> Stages:
    """Score the same pool with the same teacher in a workdir of its own."""
    changes = {"workdir": str(folder / "work"), "pods": pods}
    copied = Stages.on(stages.config.model_copy(update=changes), folder)
    copied.teacher = stages.teacher
    assert copied.scores
    return copied


def files_of(stages: Stages) -> dict[str, bytes]:
    """Return the files of all shard groups by their path in the score folder."""
    folder = Path(stages.scores[0].folder)
    paths = [path for path in folder.rglob("*.parquet") if path.parent.name != "parts"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def group_receipt(stages: Stages) -> tuple[Path, ShardGroupReceipt]:
    """Return the path and the content of the receipt of the only shard group."""
    (path,) = Path(stages.scores[0].folder).rglob("receipt.json")
    return path, ShardGroupReceipt.model_validate_json(path.read_text())


def test_a_group_with_more_images_than_estimated_is_ranked_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[int] = []
    head_size = score_file.first_band_size

    def record_head(images_per_class: int, units: float) -> int:
        heads.append(head_size(images_per_class, units))
        return heads[-1]

    monkeypatch.setattr(score_file, "first_band_size", record_head)
    first = Stages(tmp_path, unlabeled=[str(misleading_pool(tmp_path / "misleading"))], images_per_class=40)
    whole = score_in_workdir(first, tmp_path / "whole", pods=1)
    monkeypatch.setattr(group_compaction, "MAX_IMAGES_PER_RANKING", MAX_IMAGES)
    one_pod, three_pods = (
        score_in_workdir(first, tmp_path / "one", pods=1),
        score_in_workdir(first, tmp_path / "three", pods=3),
    )

    path, receipt = group_receipt(one_pod)
    assert group_receipt(whole)[1].pieces == []
    assert receipt.scored == 8 * 2 + 16 * 20 > 4 * MAX_IMAGES
    assert len(receipt.pieces) > 4
    assert max(piece.scored for piece in receipt.pieces) <= MAX_IMAGES
    assert all(head < heads[0] for head in heads[1:]), "a piece has a smaller share of the best images"
    assert files_of(one_pod) == files_of(three_pods)
    assert len(files_of(one_pod)) == 3 * len(receipt.pieces)
    assert sum(pod.scored for pod in three_pods.scores) == receipt.scored

    remove = tmp_path / "remove.txt"
    keys = [row["key"] for row in whole.selection_rows()]
    remove.write_text("\n".join(keys[:5]))
    for changes in ({}, {"images_per_class": 1000, "classes_per_image": 3}, {"remove": str(remove)}):
        selections = [stages.merge(**changes) for stages in (whole, one_pod)]
        assert len({Path(selection.selection).read_bytes() for selection in selections}) == 1
        assert selections[0].ledger == selections[1].ledger
        assert selections[0].changed_by_last_tenth == selections[1].changed_by_last_tenth

    incomplete = receipt.model_copy(update={"pieces": receipt.pieces[1:]})
    path.write_text(incomplete.model_dump_json())
    with pytest.raises(SemiscaleError, match=f"{receipt.digest}: .*SEMI-E306"):
        one_pod.merge(images_per_class=7)
    path.unlink()
    before = files_of(one_pod)
    again = score_in_workdir(first, tmp_path / "one", pods=1)
    assert json.loads(path.read_text())["pieces"]
    assert files_of(again) == before, "compacting again after the receipt was lost gives the same files"


@pytest.mark.parametrize(
    "kind", ["cut off", "empty", "another Parquet file", "overwritten", "another shard's", "another teacher's"]
)
def test_shard_scores_that_are_damaged_or_foreign_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    images = sample_images.write_pool(tmp_path / "pool", 2, 4)
    shards = list_shards([str(images)])
    for shard in shards:
        path = Path(shard_scores.shard_scores_uri(str(tmp_path), shard))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_shard_scores(shard).to_parquet("t"))
    damage(
        Path(shard_scores.shard_scores_uri(str(tmp_path), shards[0])),
        kind,
        Path(shard_scores.shard_scores_uri(str(tmp_path), shards[1])),
    )
    with pytest.raises(SemiscaleError, match=f"^{path.parent}/{shards[0].digest()}.parquet: .*SEMI-E273"):
        GroupCompactor(str(tmp_path), "t", 0, 12, 1, 3, lambda: None).compact(
            ShardGroup(digest="u", shards=shards), str(tmp_path / "u")
        )
    assert not (tmp_path / "u").exists()


def make_shard_scores(shard: Shard) -> ShardScores:
    """Return the scores of four images."""
    count = ShardAccounting(shard=shard.name, digest=shard.digest(), listed=4, scored=4, failed={})
    samples = {
        "index": range(4),
        "key": list("abcd"),
        "uri": [shard.uri] * 4,
        "offset": range(4),
        "size_bytes": range(4),
    }
    labels_BP = np.tile(np.arange(3, dtype=np.uint16), (4, 1))
    return ShardScores(count, [], 0.0, pa.table(samples), labels_BP, np.ones((4, 3), np.float32))


def damage(path: Path, kind: str, other: Path) -> None:
    """Truncate a file, empty it, overwrite its middle, or replace it by another one."""
    data = path.read_bytes()
    if kind == "another Parquet file":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind == "another teacher's":
        path.write_bytes(shard_scores.shard_scores_from_parquet(data, str(path), "t").to_parquet("u"))
    else:
        truncated, half = data[: len(data) // 2], len(data) // 2
        overwritten = data[:4] + bytes(half) + data[4 + half :]
        path.write_bytes({"cut off": truncated, "empty": b"", "overwritten": overwritten}.get(kind, other.read_bytes()))
