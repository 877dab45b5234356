"""Test the statements of docs/kubeflow.md about the pods of a run with the compiled pipelines."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPILED = [ROOT / "manifests" / "pipeline.yaml", *sorted((ROOT / "manifests" / "compiled").glob("*.yaml"))]


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda path: path.name)
def test_a_run_has_25_pods_and_three_for_each_iteration(compiled: Path) -> None:
    pipeline, _ = yaml.safe_load_all(compiled.read_text())
    tasks = pipeline["root"]["dag"]["tasks"].values()
    loops = [task["componentRef"]["name"] for task in tasks if "parameterIterator" in task]
    # Kubeflow Pipelines 2.17.0 adds a driver to the run, to each task, to each loop and to each iteration.
    pods = 1 + 2 * (len(tasks) - len(loops)) + len(loops)
    assert pods == 25
    for loop in loops:
        assert 1 + 2 * len(pipeline["components"][loop]["dag"]["tasks"]) == 3
    page = (ROOT / "docs" / "kubeflow.md").read_text()
    assert f"A run has {pods} pods and three for each iteration" in page
    assert f"A run with seven iterations has {pods + 3 * 7} pods" in page
    assert f"is 8 and the run has {pods + 3 * 8} pods" in page
