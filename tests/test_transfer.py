"""Transfer to another class set (Table 13), by the command that the README has."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.shared.errors import Refused
from components.train.train import TrainConfig, train
from tests.stages import Stages

CLASSES = {"cyan": (1, 2), "magenta": (0, 2)}  # the channels that are bright


def write_folders(root: Path, per_class: int, seed: int) -> str:
    """Write class folders of two classes that the teacher has never heard of."""
    for name, channels in CLASSES.items():
        for number in range(per_class):
            pixels = np.random.default_rng([seed, number]).integers(0, 120, (8, 8, 3), np.uint8)
            pixels[..., channels] += 110
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
    return str(root)


def test_a_trained_model_is_transferred_to_another_class_set(tmp_path: Path) -> None:
    """The head is new, the rest goes on from what was learnt; what is not given is Table 13's."""
    teacher = Stages(tmp_path / "a").teacher
    sets = {
        name: [write_folders(tmp_path / "b" / name, count, seed)]
        for seed, (name, count) in enumerate({"labeled": 4, "validation": 4, "test": 2}.items())
    }
    other = Stages(tmp_path / "b", **sets, classes="")
    assert other.plan.classes == ["cyan", "magenta"]
    options = {
        "workdir": other.workdir, "recipe": "transfer", "plan": other.uri(other.plan), "architecture": "resnet8_small",
        "start_weights": teacher.checkpoint, "resolution": 8, "augmentation": "shift-flip",
    }  # fmt: skip
    papers = TrainConfig.model_validate(options)
    assert (papers.learning_rate, papers.batch_size, papers.weight_decay, papers.epochs) == (0.0025, 768, 0.001, 300)
    options |= {"batch_size": 8, "learning_rate": 0.5, "epochs": 40}  # eight images: 300 epochs are four of its steps
    command = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, "-m", "components.train", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all but the head, which is new, for 2 classes" in done.stdout
    receipt = train(TrainConfig.model_validate(options))  # is found finished
    assert receipt.classes == ["cyan", "magenta"]
    assert receipt.source.startswith(teacher.checkpoint)
    assert receipt.validation_top1 > 0.9
    as_before = papers.model_copy(update={"start": other.uri(teacher), "start_weights": ""})
    with pytest.raises(Refused, match="a resnet8_small of 3 classes; .*; for other classes give it as --start-weights"):
        train(as_before)
