"""Test that a container's limit decides how many cores a process may use."""

import os
from pathlib import Path

import pytest

from semiscale.common.cpu import available_cpus, intra_op_threads

CPUS = os.cpu_count() or 1


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", CPUS), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", CPUS), ("odd", CPUS)],
)
def test_a_limit_is_read_from_the_control_group(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cpus(tmp_path / "cpu.max") == expected


def test_without_control_groups_all_cores_count(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "none") == CPUS


def test_the_environment_sets_the_threads_of_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert intra_op_threads() == 7
