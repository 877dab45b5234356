"""Test that errors in run files are one line with the key and the nearest name."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_parameters import INPUT_URI_KEYS

ROOT = Path(__file__).resolve().parents[2]
# These keys have no default.
REQUIRED: dict[str, Any] = {"name": "a", "workdir": "w", "labeled": "l", "unlabeled": "u", "test": "t"}
# These YAML aliases expand to 9^10 values.
ALIAS_BOMB = [f"&{name} [{', '.join(9 * ['*' + before])}]" for before, name in pairwise("abcdefghijk")]


def test_a_single_uri_becomes_a_list() -> None:
    settings = run_config.validate_run_config({**REQUIRED, "labeled": ["a", "gs://b/c"]}, "here")
    assert settings.labeled == ["a", "gs://b/c"]
    assert settings.unlabeled == ["u"]
    assert settings.validation == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"images_per_clas": 3}, r"^here: images_per_clas: .* unknown\. Did you mean 'images_per_class'"),
        (
            {"images_per_class": 0},
            r"^here: images_per_class: The value 0 is not valid\. Give 1 or more\. \[SEMI-E100\]$",
        ),
        (
            {"images_per_class": "many"},
            r"^here: images_per_class: The value 'many' is not valid\. Give a whole number\. \[SEMI-E100\]$",
        ),
        ({"classes_per_image": -1}, r"^here: classes_per_image: .* -1 .*\[SEMI-E100\]$"),
        ({"seed": -1}, r"^here: seed: .* -1 .*\[SEMI-E100\]$"),
        ({"seed": 2**31}, r"^here: seed: .*"),
        ({"batch_size": 0}, r"^here: batch_size: .* 0 .*1 or more, or -1 .*\[SEMI-E100\]$"),
        (
            {"weight_decay": -0.1},
            r"^here: weight_decay: .* -0\.1 .*0 or more, or -1 .*\[SEMI-E100\]$",
        ),
        ({"resolution": 4}, r"^here: resolution: .*"),
        ({"pods": 1001}, r"^here: pods: .*"),
        (
            {"finetune_learning_rates": [0.1, "x"]},
            r"^here: finetune_learning_rates.1: .*'x'.*a number\. \[SEMI-E100\]$",
        ),
        ({"finetune_learning_rates": []}, r"^here: finetune_learning_rates: .*"),
        ({"labeled": ""}, r"^here: labeled: .* 1 or more entries"),
        ({"labeled": ["a", " "]}, r"^here: labeled.1: .*"),
        ({"teacher_learning_rate": float("inf")}, r"^here: teacher_learning_rate: .* a finite number\."),
        ({"workdir": ""}, r"^here: workdir: .*"),
        ({"name": "Not A Name"}, r"^here: name: .*"),
        ({"baseline_recipe": "best"}, r"^here: baseline_recipe: .*'baseline' or 'modern'"),
        ({"augmentation": "flip"}, r"^here: augmentation: .*'crop-flip', 'shift-flip' or 'shift'"),
        ({"max_failed_fraction": 2}, r"^here: max_failed_fraction: .*"),
    ],
)
def test_errors_of_values_name_the_key(change: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line) as error:
        run_config.validate_run_config({**REQUIRED, **change}, "here")
    assert error.value.code == "SEMI-E100"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hardware", "proposal"),
    [
        ({"gpu": 1}, "Did you mean 'cpu'?"),
        ({"xyz": 1}, "Valid names are cpu, priority, queue, scan, secret, training."),
        ({"scan": {"gpuss": 1}}, "Did you mean 'gpus' or 'gpu' or 'cpu'?"),
        # Only trainings have nodes.
        ({"scan": {"nodes": 2}}, "Did you mean 'node_selector'?"),
        ({"scan": {"tolerations": [{"efect": ""}]}}, "Did you mean 'effect'?"),
    ],
)
def test_an_unknown_key_gets_proposals_from_its_own_section(hardware: dict[str, Any], proposal: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^here: hardware\.") as error:
        run_config.validate_run_config({**REQUIRED, "hardware": hardware}, "here")
    assert proposal in error.value.message
    key = error.value.message.split(": ")[1].rpartition(".")[2]
    assert repr(key) not in error.value.message, "the refused key is not proposed"


@pytest.mark.parametrize(
    "change",
    [{"name": "Not A Name"}, {"champion": "?"}, {"labeled": [" "]}, {"hardware": {"scan": {"memory": "40 GB"}}},
     {"hardware": {"queue": "_"}}, {"seed": "x", "pods": 0, "test": 5}, {"hardware": 3}, {"classes": 5}],
)  # fmt: skip
def test_errors_of_values_are_sentences_without_patterns(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=r"The value .* is not valid\. Give .*\. \[SEMI-E100\]$") as error:
        run_config.validate_run_config({**REQUIRED, **change}, "here")
    assert "[a-z0-9]" not in str(error.value)
    assert "nput should" not in str(error.value)


def test_a_misspelt_key_is_reported_before_a_missing_key() -> None:
    content = {"labelled" if key == "labeled" else key: value for key, value in REQUIRED.items()}
    with pytest.raises(InvalidInputError, match=r"^here: labelled: .* Did you mean 'labeled'"):
        run_config.validate_run_config(content, "here")


def test_a_file_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"SEMI-E102"):
        run_config.load_run_config(tmp_path / "run.yaml")


def test_a_missing_key_is_reported() -> None:
    with pytest.raises(InvalidInputError, match=r"^here: test: .* missing"):
        run_config.validate_run_config({key: value for key, value in REQUIRED.items() if key != "test"}, "here")


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("- a\n- b\n", "SEMI-E104", "expected keys and values, found list"),
        ("", "SEMI-E104", "expected keys and values, found nothing"),
        ("a: [", "SEMI-E103", "not valid YAML: line 1: "),
        ("labeled: " + "[" * 5000, "SEMI-E103", "nested too deep"),
        ("name: a\nseed: 1\nname: b\n", "SEMI-E103", "not valid YAML: line 3: 'name' is given twice"),
        ("hardware: {scan: {gpus: 1, gpus: 2}}", "SEMI-E103", "'gpus' is given twice"),
        ("name: 2026-02-31", "SEMI-E103", "not valid YAML: day is out of range"),
        ("name: !!python/object/apply:os.system [exit]", "SEMI-E103", "could not determine a constructor"),
        (
            f"name: [&a [lol], {', '.join(ALIAS_BOMB)}]\nworkdir: w",
            "SEMI-E100",
            "name: The value \\[\\['lol'\\].* Give a text",
        ),
        (f"name: {'A' * 1_000_000}", "SEMI-E100", "name: .* lower-case letters"),
    ],
)
def test_files_that_are_not_run_files_are_rejected(tmp_path: Path, text: str, code: str, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=line) as error:
        run_config.load_run_config(path)
    assert error.value.code == code
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("key", [*INPUT_URI_KEYS, "workdir"])
def test_credentials_in_a_uri_are_rejected_and_not_printed(key: str) -> None:
    uri = "s3://AKIA:SEC/RET@bucket/key"
    with pytest.raises(InvalidInputError, match=f"^here: {key}.*: .* Give a URI without credentials") as error:
        run_config.validate_run_config({**REQUIRED, key: uri}, "here")
    assert "SEC" not in str(error.value)


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"SEMI-E101"):
        run_config.load_run_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "manifests" / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_run_files_of_the_repository_are_valid(path: Path) -> None:
    settings = run_config.load_run_config(path)
    assert settings.name == path.stem


def test_paper_run_file_has_the_numbers_of_the_paper() -> None:
    content = yaml.safe_load((ROOT / "manifests" / "runs" / "paper.yaml").read_text())
    assert content["images_per_class"] == 16_000
    assert content["pretrain_images_processed"] == 1_000_000_000
