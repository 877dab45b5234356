"""Test foreign weights in the layouts of torchvision and the authors."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from semiscale.common.errors import InvalidInputError
from semiscale.models import checkpoint_io, networks, pretrained_weights
from semiscale.models.checkpoint_metadata import CheckpointRef
from semiscale.receipts.train import TrainReceipt
from semiscale.stages.plan.stage import PlanConfig, plan
from semiscale.stages.train.pretrained_teacher import min_accepted_accuracy, swapped_classes
from tests.support import sample_images
from tests.support.stages import Stages

State = dict[str, Tensor]


def save_pth(path: Path, content: object, **options: Any) -> CheckpointRef:
    """Write a .pth file as training scripts do, and return a reference to it."""
    torch.save(content, path, **options)
    return CheckpointRef(str(path))


def build_network(classes: int = 3, seed: int = 0) -> nn.Module:
    """Build a small network whose weights depend on a seed."""
    torch.manual_seed(seed)
    return networks.build_model("resnet8_small", classes)


def has_equal_tensors(model: nn.Module, other: nn.Module, ignored_prefix: str = "-") -> bool:
    """Return whether two networks have equal tensors, except those with a prefix."""
    states = model.state_dict(), other.state_dict()
    return all(
        torch.equal(states[0][name], states[1][name]) for name in states[0] if not name.startswith(ignored_prefix)
    )


def wrap_state(key: str) -> Callable[[State], object]:
    return lambda state: {key: state, "epoch": 90, "optimizer": {"lr": 0.1}}


def drop_counters(state: State) -> State:
    """Return a state without batch counters, as before torch 0.4.1."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "layout",
    [
        dict,
        wrap_state("state_dict"),
        wrap_state("model"),
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        drop_counters,
    ],
)
# The authors' files are from 2019 and not zipped.
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_every_layout_is_read(tmp_path: Path, layout: Callable[[State], object], zipped: bool) -> None:
    source, target = build_network(seed=1), build_network(seed=2)
    pinned = save_pth(tmp_path / "a.pth", layout(source.state_dict()), _use_new_zipfile_serialization=zipped)
    pretrained_weights.load_strict(target, "resnet8_small", pretrained_weights.read_state_dict(pinned))
    assert has_equal_tensors(source, target)


def test_the_authors_released_layout_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(1)
    released = resnet18()
    pinned = save_pth(tmp_path / "semi_supervised_resnet18.pth", released.state_dict())
    model = networks.build_model("resnet18", 1000)
    pretrained_weights.load_strict(model, "resnet18", pretrained_weights.read_state_dict(pinned))
    assert has_equal_tensors(released, model)


def test_densenets_old_names_are_read(tmp_path: Path) -> None:
    source = networks.build_model("densenet121", 3)
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: tensor
        for name, tensor in source.state_dict().items()
    }
    target = networks.build_model("densenet121", 3)
    pretrained_weights.load_strict(
        target, "densenet121", pretrained_weights.read_state_dict(save_pth(tmp_path / "densenet121.pth", old))
    )
    assert has_equal_tensors(source, target)


def test_a_safetensors_file_without_metadata_is_read(tmp_path: Path) -> None:
    source, target = build_network(seed=1), build_network(seed=2)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    pretrained_weights.load_strict(
        target, "resnet8_small", pretrained_weights.read_state_dict(CheckpointRef(str(tmp_path / "a.safetensors")))
    )
    assert has_equal_tensors(source, target)


def test_a_head_of_another_size_is_replaced_for_transfer_and_refused_for_scoring(tmp_path: Path) -> None:
    source, target, fresh = build_network(classes=10, seed=1), build_network(seed=2), build_network(seed=2)
    read = pretrained_weights.read_state_dict(save_pth(tmp_path / "a.pth", source.state_dict()))
    assert pretrained_weights.load_except_head(target, "resnet8_small", read, 8)
    assert has_equal_tensors(source, target, ignored_prefix="fc.")
    assert torch.equal(target.get_parameter("fc.weight"), fresh.get_parameter("fc.weight"))
    with pytest.raises(InvalidInputError, match=r"resnet8_small.*SEMI-E131"):
        pretrained_weights.load_strict(target, "resnet8_small", read)


def test_a_head_of_the_same_size_is_kept(tmp_path: Path) -> None:
    source, target = build_network(seed=1), build_network(seed=2)
    assert not pretrained_weights.load_except_head(
        target,
        "resnet8_small",
        pretrained_weights.read_state_dict(save_pth(tmp_path / "a.pth", source.state_dict())),
        8,
    )
    assert has_equal_tensors(source, target)


class Malicious:
    """A pickle that runs a program when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {"fc.weight": Malicious(tmp_path / "ran")}}
    pinned = save_pth(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInputError, match=r"a.pth: .*SEMI-E148") as refusal:
        pretrained_weights.read_state_dict(pinned)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_that_would_run_a_program_is_refused_and_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(InvalidInputError, match=r"a.pth: .*SEMI-E148"):
        pretrained_weights.read_state_dict(CheckpointRef(str(tmp_path / "a.pth")))
    assert not (tmp_path / "ran").exists()


def encode_whole_model() -> bytes:
    buffer = io.BytesIO()
    torch.save(build_network(), buffer)
    return buffer.getvalue()


def encode_truncated_state() -> bytes:
    buffer = io.BytesIO()
    torch.save(build_network().state_dict(), buffer)
    return buffer.getvalue()[:5000]


def encode_numbers_only() -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 3}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.pth", encode_whole_model, "SEMI-E148"),
        ("a.pth", encode_truncated_state, "SEMI-E148"),
        ("a.pth", bytes, "SEMI-E148"),
        ("a.pth", lambda: b"<html>not found</html>", "SEMI-E148"),
        ("a.pth", encode_numbers_only, "SEMI-E149"),
        ("a.safetensors", lambda: b"<html>not found</html>", "SEMI-E150"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str, content: Callable[[], bytes], line: str) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(InvalidInputError, match=line) as refusal:
        pretrained_weights.read_state_dict(CheckpointRef(str(tmp_path / name)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state.pop("fc.bias"), r"has no tensor fc.bias\..*SEMI-E131"),
        (lambda state: state.update({"layer9.weight": torch.ones(1)}), r"unknown tensor layer9.weight\..*SEMI-E131"),
        (
            lambda state: state.update({"stem.0.weight": torch.ones(64, 3, 7, 7)}),
            "64 x 3 x 7 x 7 .*16 x 3.*SEMI-E131",
        ),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, change: Callable[[State], None], line: str) -> None:
    state = build_network().state_dict()
    change(state)
    read = pretrained_weights.read_state_dict(save_pth(tmp_path / "a.pth", state))
    with pytest.raises(InvalidInputError, match=line):
        pretrained_weights.load_strict(build_network(), "resnet8_small", read)


# torch warns about these kinds of tensors.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda tensor: tensor.to_sparse(), "is sparse"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is quantized"),
        (lambda tensor: tensor.to(torch.complex64), "is complex"),
        (lambda tensor: tensor.to("meta"), "has no values"),
        (lambda tensor: tensor.where(tensor < tensor.max(), torch.nan), "contains NaN"),
    ],
)
def test_tensors_without_plain_finite_numbers_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], line: str
) -> None:
    state = build_network().state_dict()
    state["fc.weight"] = change(state["fc.weight"])
    with pytest.raises(InvalidInputError, match=rf"a.pth: .*fc.weight {line}\..*SEMI-E147"):
        pretrained_weights.read_state_dict(save_pth(tmp_path / "a.pth", state))


# The tests below use a ready-made teacher in a run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainReceipt:
    """Return a teacher that another run trained on the same three colours."""
    return Stages(tmp_path_factory.mktemp("other")).teacher


def save_foreign_teacher(path: Path, receipt: TrainReceipt, order: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Save a trained teacher as a .pth file, and reorder its outputs."""
    state = checkpoint_io.load_model(receipt.checkpoint)[0].state_dict()
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][list(order)]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def test_a_ready_made_teacher_is_used_as_it_is(tmp_path: Path, trained: TrainReceipt) -> None:
    path = save_foreign_teacher(tmp_path / "teacher.pth", trained)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    stages = Stages(tmp_path, teacher_checkpoint=f"{path}#sha256={sha256[:12]}", teacher_classes="")
    receipt = stages.train("teacher", checkpoint=stages.config.teacher_checkpoint)
    assert (receipt.images_processed, receipt.source) == (0, f"{path}#sha256={sha256}")
    assert receipt.validation_top1 == trained.validation_top1
    assert has_equal_tensors(
        checkpoint_io.load_model(receipt.checkpoint)[0], checkpoint_io.load_model(trained.checkpoint)[0]
    )
    # The pods score with this teacher.
    stages.teacher = receipt
    assert sum(score.scored for score in stages.scores) == 120


def test_the_digest_of_a_ready_made_teacher_does_not_depend_on_labels_and_settings(
    tmp_path: Path, trained: TrainReceipt
) -> None:
    path = str(save_foreign_teacher(tmp_path / "teacher.pth", trained))
    first = Stages(tmp_path / "a").train("teacher", checkpoint=path)
    more = Stages(tmp_path / "b", seed=3, validation=[]).train("teacher", checkpoint=path, batch_size=6, seed=3)
    other = Stages(tmp_path / "c").train("teacher", checkpoint=trained.checkpoint)
    assert first.digest == more.digest != other.digest
    assert first.folder != more.folder


def test_new_bytes_at_the_same_path_are_another_teacher(tmp_path: Path, trained: TrainReceipt) -> None:
    path = save_foreign_teacher(tmp_path / "teacher.pth", trained)
    stages = Stages(tmp_path)
    first = stages.train("teacher", checkpoint=str(path))
    assert stages.train("teacher", checkpoint=str(path)) == first
    save_pth(path, checkpoint_io.load_model(trained.checkpoint)[0].state_dict())
    assert stages.train("teacher", checkpoint=str(path)).digest != first.digest


@pytest.mark.parametrize(
    ("name", "fragment", "order", "line"),
    [
        ("teacher.pth", "#sha256=" + "0" * 64, (0, 1, 2), r"SEMI-E146"),
        ("teacher.pth", "", (1, 2, 0), r"top-1 0.00% on 12 validation images, and .* must exceed 74.16%.*SEMI-E247"),
        ("teacher.pth", "", (0, 1), r"fc.*resnet8_small.*SEMI-E131"),
    ],
)
def test_a_teacher_that_fails_its_check_is_refused(
    tmp_path: Path, trained: TrainReceipt, name: str, fragment: str, order: tuple[int, ...], line: str
) -> None:
    path = save_foreign_teacher(tmp_path / name, trained, order)
    with pytest.raises(InvalidInputError, match=line) as refusal:
        Stages(tmp_path).train("teacher", checkpoint=f"{path}{fragment}")
    assert "\n" not in str(refusal.value)


def test_the_accuracy_that_a_teacher_must_exceed() -> None:
    assert min_accepted_accuracy([0, 1] * 200) == pytest.approx(0.5 + 3 * 0.025)
    assert min_accepted_accuracy([0, 1, 2]) == pytest.approx(2 / 3)
    assert min_accepted_accuracy(list(range(1000))) == pytest.approx(0.001 + 3 * (0.001 * 0.999 / 1000) ** 0.5)


def test_swapped_classes_are_detected() -> None:
    labels = [label for label in range(6) for _ in range(10)]
    cycles: list[dict[int, int]] = [{}, {1: 4, 4: 1}, {0: 1, 1: 2, 2: 0}]
    for swaps in cycles:
        assert swapped_classes(labels, [swaps.get(label, label) for label in labels]) == swaps
    assert swapped_classes(labels, [5 if label == 3 else label for label in labels]) == {}, "two classes that are one"
    assert swapped_classes(labels, [{0: 1, 1: 4, 4: 1}.get(label, label) for label in labels]) == {1: 4, 4: 1}
    half = [4 if number < 5 else 1 for number in range(10)]
    assert swapped_classes([1] * 10 + [4] * 10, half + [1] * 10) == {}
    assert swapped_classes([1] * 9 + [4] * 10, [4] * 9 + [1] * 10) == {}, "too few to say"


def write_class_list(path: Path, *names: str) -> str:
    path.write_text("\n".join(names))
    return str(path)


# The bright channels of each class.
COLOURS = {"blue": (2,), "cyan": (1, 2), "green": (1,), "magenta": (0, 2), "red": (0,)}


def write_colours(root: Path, seed: int) -> list[str]:
    """Write class folders of five colours, ten images each."""
    for name, channels in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng([seed, number]).integers(0, 100, (8, 8, 3), np.uint8)
            pixels[..., channels] += 150
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return [str(root)]


def test_a_teacher_whose_classes_are_exchanged_is_refused(tmp_path: Path) -> None:
    """Two of five classes are exchanged.

    Three in five answers are right, far above chance.
    """
    sets = {name: write_colours(tmp_path / name, seed) for seed, name in enumerate(("labeled", "validation", "test"))}
    stages = Stages(tmp_path, classes="", **sets)
    assert stages.teacher.validation_top1 > 0.9
    path = str(save_foreign_teacher(tmp_path / "teacher.pth", stages.teacher, (0, 4, 2, 3, 1)))
    with pytest.raises(InvalidInputError, match="'cyan'.*'red'.*SEMI-E246"):
        stages.train("teacher", checkpoint=path)
    classes = write_class_list(tmp_path / "classes.txt", *sorted(COLOURS))
    assert 0.5 < stages.train("teacher", checkpoint=path, checkpoint_classes=classes).validation_top1 < 0.7


def make_plan(root: Path, **changes: object) -> None:
    plan(PlanConfig.model_validate(sample_images.write_run(root, **changes)))


def test_the_plan_refuses_an_unusable_teacher(tmp_path: Path, trained: TrainReceipt) -> None:
    pth = str(save_foreign_teacher(tmp_path / "teacher.pth", trained))
    ours, swapped = trained.checkpoint, write_class_list(tmp_path / "swapped.txt", "green", "red", "blue")
    cases: list[tuple[dict[str, object], str]] = [
        ({"teacher_checkpoint": "/nowhere/a.pth"}, "teacher_checkpoint: /nowhere/a.pth.*SEMI-E130"),
        ({"student_start_weights": str(tmp_path / "a.zip")}, "student_start_weights: .*SEMI-E133"),
        ({"teacher_checkpoint": f"{pth}#sha256=xyz"}, "teacher_checkpoint: .*SEMI-E132"),
        ({"teacher_checkpoint": pth, "teacher_start_weights": pth}, "teacher_start_weights: .*SEMI-E206"),
        ({"teacher_classes": swapped}, "teacher_classes: .*SEMI-E207"),
        ({"teacher_checkpoint": pth, "teacher_classes": swapped}, "lass 0.*'green'.*'red'.*SEMI-E138"),
        ({"teacher_checkpoint": pth, "teacher_classes": "/nowhere"}, "teacher_classes: /nowhere.*SEMI-E134"),
        ({"teacher_checkpoint": ours, "resolution": 16}, "8 x 8 pixels, .*16 x 16.*SEMI-E139"),
        ({"teacher_checkpoint": ours, "teacher_architecture": "resnet50"}, "resnet8_small.*resnet50.*SEMI-E137"),
        ({"teacher_checkpoint": ours, "classes": swapped}, "lass 0.*'red'.*'green'.*SEMI-E138"),
        ({"teacher_architecture": "r2plus1d_34"}, "teacher_architecture: 'r2plus1d_34'.*SEMI-E152"),
    ]  # fmt: skip
    for number, (changes, line) in enumerate(cases):
        with pytest.raises(InvalidInputError, match=line):
            make_plan(tmp_path / str(number), **changes)
    make_plan(
        tmp_path / "good",
        teacher_checkpoint=pth,
        teacher_classes=write_class_list(tmp_path / "c", *sample_images.CLASSES),
    )


def test_a_training_starts_from_weights_of_other_classes(tmp_path: Path) -> None:
    source = build_network(classes=10, seed=7)
    pinned = save_pth(tmp_path / "pretrained.pth", source.state_dict())
    receipt = Stages(tmp_path).train("teacher", start_weights=pinned.uri, images_processed=12, learning_rate=1e-9)
    assert receipt.source.startswith(f"{pinned.uri}#sha256=")
    convolution = checkpoint_io.load_model(receipt.checkpoint)[0].get_parameter("stem.0.weight")
    torch.testing.assert_close(convolution, source.get_parameter("stem.0.weight"), rtol=0, atol=1e-6)
