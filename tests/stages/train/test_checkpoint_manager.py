"""Test which checkpoints of a training are kept, and which one is loaded.

Some of them are damaged or belong to another training.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from semiscale import storage
from semiscale.common.errors import InvalidInputError
from semiscale.stages.train.checkpoint_manager import CheckpointManager, TrainerProgress


def save(checkpoints: CheckpointManager, step: int) -> None:
    """Write a checkpoint whose tensors contain its step."""
    progress = TrainerProgress(step=step, images_processed=step * 10, ranks=1, seconds=0.0, curve=[])
    checkpoints.save(progress, {"step": torch.tensor([step])})


def load_latest_step(folder: str) -> int:
    """Return the step from which a new process resumes, or 0 without a checkpoint."""
    newest = CheckpointManager(folder).load_latest()
    assert newest is None or newest[0].step == int(newest[1]["step"])
    return newest[0].step if newest else 0


def list_files(folder: str, step: int) -> list[str]:
    """Return the files of the checkpoints of a step: the manifest, then the tensors."""
    entries = storage.list_objects(storage.join(folder, "checkpoints"))
    return sorted(entry.uri for entry in entries if entry.uri.rpartition("/")[2].startswith(f"{step * 10:015}"))


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = str(tmp_path)
    checkpoints = CheckpointManager(folder)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert [len(list_files(folder, step)) for step in (1, 2, 3)] == [0, 2, 2]
    assert load_latest_step(folder) == 3


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    """Copy a checkpoint to another training, and move a training to another workdir.

    The tensors of both trainings may have the same shapes. Only the manifest names the training.
    """
    save(CheckpointManager(str(tmp_path / "a")), 1)
    for folder in ("b", "moved/a"):
        shutil.copytree(tmp_path / "a", tmp_path / folder)
    assert load_latest_step(str(tmp_path / "moved" / "a")) == 1
    line = r"/b/checkpoints/.*json: .*SEMI-E241"
    with pytest.raises(InvalidInputError, match=line):
        CheckpointManager(str(tmp_path / "b")).load_latest()


def test_a_manifest_that_does_not_name_its_training_is_accepted(tmp_path: Path) -> None:
    save(CheckpointManager(str(tmp_path)), 1)
    path = Path(list_files(str(tmp_path), 1)[0])
    manifest = json.loads(path.read_text())
    del manifest["training"]
    path.write_text(json.dumps(manifest))
    assert load_latest_step(str(tmp_path)) == 1


@pytest.mark.parametrize("part", [0, 1])
def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two(tmp_path: Path, part: int) -> None:
    """Resume from an older checkpoint, and save a step below the damaged one."""
    folder = str(tmp_path)
    for step in (10, 20):
        save(CheckpointManager(folder), step)
    uri = list_files(folder, 20)[part]
    storage.write_bytes(uri, storage.read_bytes(uri)[:-9])
    resumed = CheckpointManager(folder)
    newest = resumed.load_latest()
    assert newest is not None
    assert newest[0].step == 10
    assert len(list_files(folder, 20)) == 2, "nothing is deleted before there is another"
    save(resumed, 15)
    assert [len(list_files(folder, step)) for step in (10, 15, 20)] == [2, 2, 0]
    uri = list_files(folder, 15)[part]
    storage.write_bytes(uri, b"")
    assert load_latest_step(folder) == 10


def test_tensors_of_a_killed_writer_are_no_checkpoint(tmp_path: Path) -> None:
    """Leave tensors without a manifest, like a process that is killed in a save."""
    folder = str(tmp_path)
    first = CheckpointManager(folder)
    save(first, 1)
    Path(storage.join(folder, "checkpoints", f"{20:015}-0000aaaa.safetensors")).write_bytes(b"half of it")
    assert load_latest_step(folder) == 1
    save(first, 2)
    save(first, 3)
    assert load_latest_step(folder) == 3
    save(first, 4)
    assert not list(Path(folder, "checkpoints").glob("*aaaa*")), (
        "older than the last two, so no process will write its manifest"
    )
