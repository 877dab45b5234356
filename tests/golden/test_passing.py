"""Test that a task passes the same inputs to its stage as version 0.1.0."""

from typing import Any

import pytest

from tests.golden import passing, program
from tests.golden.passing import Receipts
from tests.golden.test_digests import RUNS, parameters_of

RECEIPTS = Receipts(
    plan="p", teacher="t", unscored="u", scores=["s0", "s1"], selection="m", unpacked="n", packed="k", pretrained="r",
    students=["f0", "f1"], baselines=["b0", "b1"], evaluation="e", promotion="o",
)  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_config_has_the_fields_of_version_0_1_0(name: str) -> None:
    run = parameters_of(name)
    plan, count = {"plan": "p"}, {"plan": "p", "teacher": "t"}
    pack = {"plan": "p", "selection": "m"}
    models = {"teacher": "t", "baselines": ["b0", "b1"], "pretrained": "r", "students": ["f0", "f1"]}
    report = {"scores": ["s0", "s1"], "selection": "m", "packed": "k", "evaluation": "e", "promotion": "o"}
    tasks: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("train", passing.teacher(run, RECEIPTS), {**plan, "role": "teacher", "learning_rate": -1.0}),
        ("train", passing.pretrain(run, RECEIPTS), {**plan, "role": "pretrain", "packed": "k"}),
        (
            "train",
            passing.finetune(run, RECEIPTS, 0.1),
            {**plan, "role": "finetune", "start": "r", "learning_rate": 0.1},
        ),
        ("train", passing.baseline(run, RECEIPTS, 0.2), {**plan, "role": "baseline", "learning_rate": 0.2}),
        ("count-unscored", passing.count_unscored(run, RECEIPTS), count),
        ("score", passing.score(run, RECEIPTS, 3), {**count, "count": "u", "pod": 3}),
        ("merge", passing.merge(run, RECEIPTS), {**plan, "scores": ["s0", "s1"]}),
        ("count-unpacked", passing.count_unpacked(run, RECEIPTS), pack),
        ("pack", passing.pack(run, RECEIPTS, 2), {**pack, "count": "n", "pod": 2}),
        ("evaluate", passing.evaluate(run, RECEIPTS), {**plan, **models}),
        ("promote", passing.promote(run, RECEIPTS), {**plan, "evaluation": "e"}),
        ("report", passing.report(run, RECEIPTS), {**plan, **models, **report}),
    ]
    for stage, fields, inputs in tasks:
        assert program.config_in_run(stage, run, inputs) == program.config(stage, fields), stage
    assert program.plan_through_the_form(run) == program.config("plan", passing.plan(run))
