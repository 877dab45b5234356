"""Test the verb `reselect` with another K or P, a threshold and a removal list."""

import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from semiscale.cli.main import main
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.receipts.markdown import summarize
from semiscale.receipts.merge import ExclusionStats, SelectionReceipt
from tests.support import sample_images
from tests.support.stages import Stages

# The verb does not compile the graph.
NO_PIPELINE: Any = None


def rows(receipt: SelectionReceipt) -> list[tuple[int, int, str]]:
    """Return (class, rank, key) of every row."""
    return [(row["class"], row["rank"], row["key"]) for row in pq.read_table(receipt.selection).to_pylist()]


def test_another_k_selects_from_the_same_ranking(tmp_path: Path) -> None:
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
        expected = [key for row_label, _, key in longer if row_label == label and key not in unwanted][:12]
        assert [key for row_label, _, key in rows(receipt) if row_label == label] == expected
    assert receipt.ledger.model_dump() == {"listed": 120, "scored": 117, "failed": 0, "removed": 3}
    # A shard has 40 images.
    lost = [int(key) // 40 for key in unwanted]
    assert pq.read_table(receipt.shards).to_pylist() == [
        {
            "shard": f"pool-{shard:03}.tar",
            "listed": 40,
            "scored": 40 - lost.count(shard),
            "failed": 0,
            "removed": lost.count(shard),
        }
        for shard in range(3)
    ]


UNUSUAL_KEYS = ["plain", " spaced ", "line\u2028separated", "folder/é"]


@pytest.mark.parametrize("list_format", ["{}\n", "\ufeff{}\n", "{}", "{}\r\n", "no-such-key\n{}\r\n\r\n"])
def test_a_key_with_any_characters_is_removed(tmp_path: Path, unusual_keys: Stages, list_format: str) -> None:
    for key in UNUSUAL_KEYS:
        (tmp_path / "remove.txt").write_bytes(list_format.format(key).encode())
        receipt = unusual_keys.merge(images_per_class=100, classes_per_image=1, remove=str(tmp_path / "remove.txt"))
        assert receipt.ledger.removed == 1
        assert {key for _, _, key in rows(receipt)} == {*UNUSUAL_KEYS} - {key}


@pytest.fixture(scope="module")
def unusual_keys(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Return a scored pool of images with unusual keys."""
    root = tmp_path_factory.mktemp("odd")
    members = {f"{key}.png": sample_images.draw_png(number % 3, number) for number, key in enumerate(UNUSUAL_KEYS)}
    stages = Stages(root, unlabeled=[str(sample_images.write_tar(root / "odd.tar", members))])
    assert stages.scores
    return stages


def test_keys_that_match_nothing_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages, remove = Stages(tmp_path), tmp_path / "remove.txt"
    remove.write_text("00001\n00002.png\n 00003\n00041\n")
    receipt = stages.merge(remove=str(remove))
    assert receipt.ledger.removed == 2
    assert receipt.removal is not None
    assert receipt.removal.model_dump() == {"keys": 4, "unmatched": 2, "examples": [" 00003", "00002.png"]}
    line = "removal list: 2 of 4 keys match no scored image, for example ' 00003', '00002.png'; the key of an image"
    assert line in capsys.readouterr().out
    assert "2 of 4 keys match no scored image" in summarize(receipt)
    remove.write_text("00001\n")
    assert stages.merge(remove=str(remove)).removal == ExclusionStats(keys=1, unmatched=0, examples=[])
    assert stages.merge().removal is None


def test_a_list_that_is_not_utf8_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "remove.txt").write_bytes("00001\né\n".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"remove: .*remove\.txt: .*6.*SEMI-E065"):
        assert Stages(tmp_path, remove=str(tmp_path / "remove.txt")).plan


def test_the_removal_list_is_part_of_the_digest_of_the_selection(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    remove = tmp_path / "remove.txt"
    remove.write_text("00001\n")
    first = stages.merge(remove=str(remove))
    remove.write_text("00001\n00002\n")
    assert stages.merge(remove=str(remove)).digest != first.digest != stages.merge().digest


def test_a_threshold_keeps_the_rows_above_it(tmp_path: Path) -> None:
    stages = Stages(tmp_path, images_per_class=100, classes_per_image=3)
    everything = stages.selection_rows()
    receipt = stages.merge(min_probability=0.5)
    assert rows(receipt) == [(row["class"], row["rank"], row["key"]) for row in everything if row["score"] >= 0]
    assert 0 < receipt.images < len(everything)


def test_a_threshold_that_no_image_reaches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SemiscaleError, match="min_probability.*SEMI-E300"):
        Stages(tmp_path).merge(min_probability=1 - 1e-15)


def test_more_classes_for_an_image_than_stored_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semiscale.stages.score.score_store.MIN_KEPT_CLASSES", 2)
    stages = Stages(tmp_path, classes_per_image=2)
    with pytest.raises(InvalidInputError, match="^classes_per_image: .*2.*SEMI-E302"):
        stages.merge(classes_per_image=3)


def test_the_verb_reports_a_selection_or_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(stages.content))
    assert main(NO_PIPELINE, ["reselect", str(path)]) == 2
    assert "[SEMI-E432]" in capsys.readouterr().err
    assert stages.report
    assert main(NO_PIPELINE, ["reselect", str(path), "--images-per-class", "200", "--classes-per-image", "1"]) == 0
    printed = capsys.readouterr().out
    assert "120 images (120 different), K = 200, P = 1; 0 removed" in printed
    assert "class 'red' is short: " in printed
    assert main(NO_PIPELINE, ["reselect", str(path), "--classes-per-image", "4"]) == 0
    printed = capsys.readouterr().out
    assert "P = 3;" in printed
    assert "classes_per_image: P = 4 is more than the 3 classes" in printed
    for option, value in (("--images-per-class", "0"), ("--classes-per-image", "-1"), ("--min-probability", "7")):
        assert main(NO_PIPELINE, ["reselect", str(path), option, value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"refused: {option[2:].replace('-', '_')}: The value {value}")
        assert error.count("\n") == 1


def test_the_verb_works_on_a_run_that_ended_after_scoring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the workdir is left, as after the loss of a pod in pack.

    The selection equals the selection of the run itself.
    """
    stages = Stages(tmp_path, images_per_class=100)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(stages.content))
    assert stages.scores
    shutil.rmtree(tmp_path / "receipts")
    assert main(NO_PIPELINE, ["reselect", str(path)]) == 0
    selection = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("selection: "))
    selected = pq.read_table(selection)
    assert selection.resolve() == Path(Stages.on(stages.config, tmp_path).selection.selection).resolve()
    assert main(NO_PIPELINE, ["reselect", str(path), "--min-probability", "0.9"]) == 0
    above = selected.filter(pc.greater(selected["score"], math.log(9)))
    assert 0 < len(above) < len(selected)
    assert f"{len(above):,} images" in capsys.readouterr().out
    other = Stages.on(stages.config, tmp_path)
    other.teacher = stages.train("teacher", learning_rate=0.5)
    assert other.scores
    assert main(NO_PIPELINE, ["reselect", str(path)]) == 2
    assert "[SEMI-E433]" in capsys.readouterr().err
