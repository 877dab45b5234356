"""Which checkpoints of a training are kept, and which one it goes on from, where some of them are damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress


def save(checkpoints: CheckpointManager, step: int) -> None:
    """Write a checkpoint that says in its tensors which one it is."""
    moment = TrainerProgress(step=step, images_processed=step * 10, ranks=1, seconds=0.0, curve=[])
    checkpoints.save(moment, {"step": torch.tensor([step])})


def found(folder: str) -> int:
    """Return the step that a new process would go on from; 0 where it would begin anew."""
    newest = CheckpointManager(folder).load_latest()
    assert newest is None or newest[0].step == int(newest[1]["step"])
    return newest[0].step if newest else 0


def files(folder: str, step: int) -> list[str]:
    """Return the files of the checkpoints of a step: the voucher, then the tensors."""
    entries = storage.list_objects(storage.join(folder, "checkpoints"))
    return sorted(entry.uri for entry in entries if entry.uri.rpartition("/")[2].startswith(f"{step * 10:015}"))


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    folder = str(tmp_path)
    checkpoints = CheckpointManager(folder)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert [len(files(folder, step)) for step in (1, 2, 3)] == [0, 2, 2]
    assert found(folder) == 3


def test_one_that_was_copied_from_another_training_is_refused(tmp_path: Path) -> None:
    """Of the same network as likely as not: nothing in its tensors would say so. A moved training is itself."""
    save(CheckpointManager(str(tmp_path / "a")), 1)
    for place in ("b", "moved/a"):
        shutil.copytree(tmp_path / "a", tmp_path / place)
    assert found(str(tmp_path / "moved" / "a")) == 1
    line = r"/b/checkpoints/.*json: .*SEMI-E241"
    with pytest.raises(InvalidInputError, match=line):
        CheckpointManager(str(tmp_path / "b")).load_latest()


def test_one_that_does_not_say_whose_it_is_is_taken(tmp_path: Path) -> None:
    save(CheckpointManager(str(tmp_path)), 1)
    path = Path(files(str(tmp_path), 1)[0])
    said = json.loads(path.read_text())
    del said["training"]
    path.write_text(json.dumps(said))
    assert found(str(tmp_path)) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_a_damaged_one_is_none_of_the_two(tmp_path: Path, part: int) -> None:
    """The training goes on before the damaged one, and so its next checkpoint may be an earlier one: still two good."""
    folder = str(tmp_path)
    for step in (10, 20):
        save(CheckpointManager(folder), step)
    uri = files(folder, 20)[part]
    storage.write_bytes(uri, storage.read_bytes(uri)[:-9])
    resumed = CheckpointManager(folder)
    newest = resumed.load_latest()
    assert newest is not None
    assert newest[0].step == 10
    assert len(files(folder, 20)) == 2, "nothing is deleted before there is another"
    save(resumed, 15)
    assert [len(files(folder, step)) for step in (10, 15, 20)] == [2, 2, 0]
    uri = files(folder, 15)[part]
    storage.write_bytes(uri, b"")
    assert found(folder) == 10


def test_tensors_of_a_writer_that_was_killed_are_no_checkpoint(tmp_path: Path) -> None:
    """Killed while a checkpoint was written: the tensors lie there, or a part of them under a passing name."""
    folder = str(tmp_path)
    first = CheckpointManager(folder)
    save(first, 1)
    Path(storage.join(folder, "checkpoints", f"{20:015}-0000aaaa.safetensors")).write_bytes(b"half of it")
    assert found(folder) == 1
    save(first, 2)
    save(first, 3)
    assert found(folder) == 3
    save(first, 4)
    assert not list(Path(folder, "checkpoints").glob("*aaaa*")), "older than the last two: nobody will vouch for it"
