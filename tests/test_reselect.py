"""Selecting again from the scores at hand: other K, P, a threshold, a removal list, each equal to a run of its own."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from components.shared.errors import Refused
from components.shared.receipts import SelectionReceipt
from components.verbs.main import main
from tests.stages import Stages

# The verb needs no graph; only compile does.
NO_PIPELINE: Any = None


def rows(receipt: SelectionReceipt) -> list[tuple[int, int, str]]:
    """(class, rank, key) of every row."""
    return [(row["class"], row["rank"], row["key"]) for row in pq.read_table(receipt.selection).to_pylist()]


def test_another_k_is_the_same_ranking_cut_elsewhere(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    few, many = stages.merge(images_per_class=5), stages.merge(images_per_class=20)
    assert rows(few) == [row for row in rows(many) if row[1] < 5]
    assert few.bytes_read <= many.bytes_read


def test_removed_images_are_replaced_by_the_next_ranked(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    longer = rows(stages.merge(images_per_class=20))
    unwanted = {key for label, rank, key in longer if label == 0 and rank in (0, 3, 4)}
    (tmp_path / "remove.txt").write_text("\n".join([*sorted(unwanted), "no-such-key", ""]))
    receipt = stages.merge(remove=str(tmp_path / "remove.txt"))
    for label in range(3):
        expected = [key for one, _, key in longer if one == label and key not in unwanted][:12]
        assert [key for one, _, key in rows(receipt) if one == label] == expected
    assert receipt.ledger.model_dump() == {"listed": 120, "scored": 117, "failed": 0, "removed": 3}


def test_the_removal_list_is_part_of_the_selections_name(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    remove = tmp_path / "remove.txt"
    remove.write_text("00001\n")
    first = stages.merge(remove=str(remove))
    remove.write_text("00001\n00002\n")
    assert stages.merge(remove=str(remove)).digest != first.digest != stages.merge().digest


def test_a_threshold_keeps_what_is_above_it(tmp_path: Path) -> None:
    stages = Stages(tmp_path, images_per_class=100, classes_per_image=3)
    everything = stages.selection_rows()
    receipt = stages.merge(min_probability=0.5)
    assert rows(receipt) == [(row["class"], row["rank"], row["key"]) for row in everything if row["score"] >= 0]
    assert 0 < receipt.images < len(everything)


def test_more_classes_an_image_than_were_kept_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.score.score.KEPT_CLASSES", 2)
    stages = Stages(tmp_path, classes_per_image=2)
    with pytest.raises(Refused, match="the scores keep the 2 best classes of each image; .* at most 2"):
        stages.merge(classes_per_image=3)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(stages.content))
    assert main(NO_PIPELINE, ["reselect", str(path)]) == 2
    assert "no receipts; run the pipeline first" in capsys.readouterr().err
    assert stages.report
    assert main(NO_PIPELINE, ["reselect", str(path), "--images-per-class", "200", "--classes-per-image", "1"]) == 0
    printed = capsys.readouterr().out
    assert "120 images (120 different), K = 200, P = 1; 0 removed" in printed
    assert "class 'red' is short: " in printed
    for option, value in (("--images-per-class", "0"), ("--classes-per-image", "-1"), ("--min-probability", "7")):
        assert main(NO_PIPELINE, ["reselect", str(path), option, value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"refused: {option[2:].replace('-', '_')}: input should be")
        assert error.count("\n") == 1
