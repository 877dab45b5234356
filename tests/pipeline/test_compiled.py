"""Test that the compiled files are current and have the hardware of the run file."""

import difflib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import pipeline
from components import container_images
from semiscale.cli.compile import (
    COMPILED_RUNS,
    DEFAULT_PIPELINE_YAML,
    MANIFESTS,
    compile_pipeline,
    replace_images,
    write_pipeline_yaml,
)
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.resources import (
    FAN_OUT_ENV,
    INDEXED_JOB_ENV,
    PROMETHEUS_ANNOTATIONS,
    S3_CREDENTIAL_ENV,
    SUPERVISION_ENV,
    TRAINJOB_ENV,
    IndexedJobSettings,
    Supervision,
    TrainJobSettings,
)
from semiscale.config.run_config import RunConfig

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
REQUIRED: dict[str, Any] = {"name": "a.b", "workdir": "gs://b/w", "labeled": "l", "unlabeled": "u", "test": "t"}
STAGES = ("plan", "train", "score", "merge", "pack", "evaluate", "promote", "report")
COUNTS = ("count-unscored", "count-unpacked")
COMPILED_FILES = (DEFAULT_PIPELINE_YAML, *sorted((MANIFESTS / "compiled").glob("*.yaml")))


def compile_run(path: Path, **changes: Any) -> list[dict[str, Any]]:
    """Compile a run file with changed keys, and return its YAML documents."""
    write_pipeline_yaml(pipeline.semiscale, path, run_config.validate_run_config({**REQUIRED, **changes}, "here"))
    return list(yaml.safe_load_all(path.read_text()))


def compile_to_objects(path: Path, **changes: Any) -> list[dict[str, Any]]:
    """Compile a run file with changed keys to Kubernetes objects, as the verb does."""
    run_file = path.with_name("run.yaml")
    run_file.write_text(yaml.safe_dump({**REQUIRED, **changes}))
    compile_pipeline(pipeline.semiscale, run_file, path, kubernetes=True)
    return list(yaml.safe_load_all(path.read_text()))


def container_of(documents: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Return the container of a stage."""
    spec: dict[str, Any] = documents[0]["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]
    return spec


def kubernetes_settings(documents: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Return the Kubernetes settings of the pod of a stage."""
    settings: dict[str, Any] = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{stage}"]
    return settings


@pytest.mark.parametrize("name", ["", *COMPILED_RUNS])
def test_the_compiled_files_are_current(name: str, tmp_path: Path) -> None:
    committed = MANIFESTS / "compiled" / f"{name}.yaml" if name else DEFAULT_PIPELINE_YAML
    settings = run_config.load_run_config(MANIFESTS / "runs" / f"{name}.yaml") if name else None
    write_pipeline_yaml(pipeline.semiscale, tmp_path / "fresh.yaml", settings)
    assert (tmp_path / "fresh.yaml").read_text() == committed.read_text(), "run: python pipeline.py compile"


@pytest.mark.parametrize("fan_out", ["loop", "job"])
def test_the_number_of_pods_changes_only_default_values(tmp_path: Path, fan_out: str) -> None:
    texts = []
    for pods in (1, 200):
        compile_run(tmp_path / "p.yaml", pods=pods, hardware={"scan": {"fan_out": fan_out}})
        texts.append((tmp_path / "p.yaml").read_text().splitlines())
    changed = [line for line in difflib.ndiff(texts[0], texts[1]) if line[0] in "+-"]
    assert [line.split()[-1].strip("]") for line in changed] == ["1.0", "200.0", "1.0", "200.0"], changed


def test_the_pods_have_every_setting_of_the_hardware(tmp_path: Path) -> None:
    scan = {
        "gpus": 2,
        "gpu": "nvidia.com/mig-1g.10gb",
        "cpu": "12",
        "memory": "40Gi",
        "shared_memory": "6Gi",
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "tolerations": [{"key": "spot", "value": "yes", "operator": "Equal", "effect": "NoExecute"}],
        "timeout_s": 7200,
        "retries": 7,
    }
    documents = compile_run(
        tmp_path / "p.yaml", hardware={"scan": scan, "queue": "gpus", "priority": "low", "secret": "s3"}
    )
    resources = container_of(documents, "score")["resources"]
    assert resources["accelerator"]["resourceType"] == "nvidia.com/mig-1g.10gb"
    assert resources["accelerator"]["resourceCount"] == "2"
    assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == "12"
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == "40Gi"
    labels = {
        "app.kubernetes.io/part-of": "semiscale",
        "kueue.x-k8s.io/queue-name": "gpus",
        "kueue.x-k8s.io/priority-class": "low",
    }
    expected = {
        # Eight attempts, each with the time to save its work and to start again.
        "activeDeadlineSeconds": str(8 * (7200 + 300)),
        "emptyDirMounts": [
            {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "6Gi", "volumeName": "shared-memory"}
        ],
        "nodeSelector": {"labels": {"cloud.google.com/gke-accelerator": "nvidia-l4"}},
        "podMetadata": {"annotations": PROMETHEUS_ANNOTATIONS, "labels": labels},
        "secretAsEnv": [
            {
                "keyToEnv": [{"envVar": key, "secretKey": key} for key in S3_CREDENTIAL_ENV],
                "optional": False,
                "secretName": "s3",
                "secretNameParameter": {"runtimeValue": {"constant": "s3"}},
            }
        ],
        "securityContext": {"runAsGroup": "1000", "runAsNonRoot": True, "runAsUser": "1000"},
        "tolerations": [{"key": "spot", "value": "yes", "operator": "Equal", "effect": "NoExecute"}],
    }
    assert kubernetes_settings(documents, "score") == kubernetes_settings(documents, "evaluate") == expected
    (score,) = documents[0]["components"]["comp-for-loop-1"]["dag"]["tasks"].values()
    assert score["retryPolicy"]["maxRetryCount"] == 7
    window_s = int(score["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
    assert window_s > 8 * 8 * 7200, "Argo counts it from the start of the first attempt"
    environment = {variable["name"]: variable["value"] for variable in container_of(documents, "score")["env"]}
    assert Supervision.model_validate_json(environment[SUPERVISION_ENV]) == Supervision(restarts=7, timeout_s=7200)


@pytest.mark.parametrize("stage", [*STAGES, *COUNTS])
def test_every_stage_has_limits(stage: str, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(DEFAULT_PIPELINE_YAML.read_text()))
    on_gpu = stage in ("train", "score", "evaluate", "promote")
    assert ("accelerator" in container_of(documents, stage)["resources"]) == on_gpu
    assert ("tolerations" in kubernetes_settings(documents, stage)) == on_gpu
    assert int(kubernetes_settings(documents, stage)["activeDeadlineSeconds"]) > 0
    assert kubernetes_settings(documents, stage)["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("path", COMPILED_FILES, ids=lambda path: path.name)
def test_the_graph_is_named_in_words(path: Path) -> None:
    """The default names of kfp are function names and `for-loop-N`.

    They are in lower case and have no spaces.
    """
    (document, _) = yaml.safe_load_all(path.read_text())
    dags = [part["dag"]["tasks"] for part in [document["root"], *document["components"].values()] if "dag" in part]
    names = [task["taskInfo"]["name"] for tasks in dags for task in tasks.values()]
    assert len(set(names)) == len(names) == 14 + 4, "stages and loops"
    assert [name for name in names if re.fullmatch(r"[a-z0-9-]+", name)] == []
    loops = [task["taskInfo"]["name"] for task in dags[0].values() if "parameterIterator" in task]
    assert sorted(loops) == ["2 Pack on pods", "2 Score on pods", "4 Fine-tunings", "Baselines"]
    # The UI of Kubeflow Pipelines 2.17 cuts longer names off.
    assert max(map(len, names)) <= 16


@pytest.mark.parametrize("path", COMPILED_FILES, ids=lambda path: path.name)
def test_a_compiled_file_has_only_ascii_characters(path: Path) -> None:
    # A database in latin1 refuses a combining circumflex.
    documents = list(yaml.safe_load_all(path.read_text()))
    assert json.dumps(documents, ensure_ascii=False).isascii()


def test_kubeflow_caches_no_task_because_buckets_can_grow() -> None:
    (document, _) = yaml.safe_load_all(DEFAULT_PIPELINE_YAML.read_text())
    dags = [document["root"], *document["components"].values()]
    tasks = [task for part in dags for task in part.get("dag", {}).get("tasks", {}).values()]
    stages = [
        task
        for task in tasks
        if task["componentRef"]["name"].removeprefix("comp-").rstrip("-234") in (*STAGES, *COUNTS)
    ]
    assert len(stages) == 14
    assert [task["taskInfo"]["name"] for task in stages if task.get("cachingOptions", {}).get("enableCache")] == []


def test_the_hardware_of_the_documentation_is_valid() -> None:
    (block,) = re.findall(
        r"```yaml\n(hardware:.*?)```", (MANIFESTS.parent / "docs" / "run-file.md").read_text(), re.DOTALL
    )
    settings = run_config.validate_run_config(REQUIRED | yaml.safe_load(block), "docs/run-file.md")
    assert settings.hardware.training.nodes == 8


def test_the_demo_asks_for_no_gpu() -> None:
    assert "accelerator" not in (MANIFESTS / "compiled" / "demo.yaml").read_text()


def test_a_training_on_many_nodes_is_followed_by_a_small_pod(tmp_path: Path) -> None:
    documents = compile_run(tmp_path / "p.yaml", hardware={"training": {"nodes": 8, "gpus": 8}, "queue": "gpus"})
    follower = container_of(documents, "train")
    assert "accelerator" not in follower["resources"]
    assert "kueue" not in json.dumps(kubernetes_settings(documents, "train"))
    launch = TrainJobSettings.model_validate_json(
        {variable["name"]: variable["value"] for variable in follower["env"]}[TRAINJOB_ENV]
    )
    assert (launch.image, launch.machine.nodes, launch.machine.gpus, launch.queue) == (
        container_images.CUDA_IMAGE,
        8,
        8,
        "gpus",
    )


@pytest.mark.parametrize(
    ("pods", "fan_out", "expected"), [(16, "", "loop"), (17, "", "job"), (64, "loop", "loop"), (2, "job", "job")]
)
def test_many_pods_are_a_job_that_two_small_pods_follow(tmp_path: Path, pods: int, fan_out: str, expected: str) -> None:
    hardware = {"scan": {"fan_out": fan_out, "gpus": 4, "retries": 7}, "queue": "gpus", "secret": "s3"}
    documents = compile_run(tmp_path / "p.yaml", pods=pods, hardware=hardware)
    for count in COUNTS:
        assert variables(documents, count)[FAN_OUT_ENV] == expected
    for stage, image, gpus in (("score", container_images.CUDA_IMAGE, 4), ("pack", container_images.CPU_IMAGE, 0)):
        is_follower = INDEXED_JOB_ENV in variables(documents, stage)
        assert is_follower == (expected == "job")
        assert ("kueue" in json.dumps(kubernetes_settings(documents, stage))) != is_follower
        if is_follower:
            assert "accelerator" not in container_of(documents, stage)["resources"]
            launch = IndexedJobSettings.model_validate_json(variables(documents, stage)[INDEXED_JOB_ENV])
            assert (launch.image, launch.machine.gpus, launch.queue, launch.secret) == (image, gpus, "gpus", "s3")
            assert int(kubernetes_settings(documents, stage)["activeDeadlineSeconds"]) > 4 * launch.machine.timeout_s
    # The task that reads the packed set, and the other users of the hardware, follow nothing.
    assert INDEXED_JOB_ENV not in variables(documents, "pack-2") | variables(documents, "evaluate")


def variables(documents: list[dict[str, Any]], stage: str) -> dict[str, str]:
    """Return the environment variables of a stage."""
    return {variable["name"]: variable["value"] for variable in container_of(documents, stage)["env"]}


def test_the_form_has_the_run_files_values(tmp_path: Path) -> None:
    documents = compile_run(tmp_path / "p.yaml", augmentation="shift", labeled=["gs://b/a", "gs://b/c"])
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert parameters["settings"]["defaultValue"] == {"augmentation": "shift"}
    assert parameters["labeled"]["defaultValue"] == ["gs://b/a", "gs://b/c"]


def test_a_pipeline_is_compiled_to_valid_kubernetes_objects(tmp_path: Path) -> None:
    objects = compile_to_objects(tmp_path / "p.yaml")
    assert [item["kind"] for item in objects] == ["Pipeline", "PipelineVersion"]
    pipeline_name, version = [item["metadata"]["name"] for item in objects]
    assert pipeline_name == "semiscale"
    assert re.fullmatch("semiscale-a-b-[0-9a-f]{16}", version)
    assert compile_to_objects(tmp_path / "p.yaml")[1] == objects[1], "applied again, it is unchanged"
    other = compile_to_objects(tmp_path / "p.yaml", pods=3)[1]
    assert other["metadata"]["name"] != version, "the cluster refuses a version that changed"
    for item in objects:
        schema = json.loads((SCHEMAS / f"pipelines.kubeflow.org_v2beta1_{item['kind']}.json").read_text())
        jsonschema.validate(item, schema)
        with pytest.raises(jsonschema.ValidationError, match="surplus"):
            jsonschema.validate({**item, "spec": {**item["spec"], "surplus": 1}}, schema)
    spec = objects[1]["spec"]
    documents = compile_run(tmp_path / "p.yaml")
    assert spec["pipelineName"] == "semiscale"
    assert [spec["pipelineSpec"], spec["platformSpec"]] == documents


def test_compile_for_a_run_names_pushed_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = f"registry.example/me/python-cuda@sha256:{'0' * 64}"
    (tmp_path / "images.json").write_text(json.dumps({container_images.CUDA_IMAGE: digest}))
    monkeypatch.setattr(container_images, "PUSHED_IMAGES_FILE", tmp_path / "images.json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**REQUIRED, "hardware": {"training": {"nodes": 2}}}))
    output = tmp_path / "out.yaml"
    compile_pipeline(pipeline.semiscale, tmp_path / "run.yaml", output, kubernetes=False)
    assert capsys.readouterr().out == f"compiled: {output}\n"
    documents = list(yaml.safe_load_all(output.read_text()))
    assert container_of(documents, "score")["image"] == digest
    assert container_of(documents, "plan")["image"] == container_images.CPU_IMAGE
    assert container_images.CUDA_IMAGE not in output.read_text(), "nor in the training job"


def test_the_names_of_images_that_were_not_pushed_stay() -> None:
    assert replace_images(f"image: {container_images.CPU_IMAGE}", {}) == f"image: {container_images.CPU_IMAGE}"


@pytest.mark.parametrize(
    ("hardware", "line"),
    [
        ({"gpus": 1}, r"^here: hardware.gpus: .* unknown"),
        ({"scan": {"node_selectors": {}}}, r"^here: hardware.scan.node_selectors: .* Did you mean 'node_sel"),
        ({"scan": {"memory": "40 GB"}}, r"^here: hardware.scan.memory: .*'40 GB'"),
        ({"training": {"nodes": 0}}, r"^here: hardware.training.nodes: .* 0 "),
        ({"scan": {"tolerations": [{"effect": "Never"}]}}, r"^here: hardware.scan.tolerations.0.effect: .*"),
    ],
)
def test_invalid_hardware_is_refused(hardware: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line):
        run_config.validate_run_config({**REQUIRED, "hardware": hardware}, "here")


def test_hardware_is_no_parameter_of_the_run() -> None:
    settings = RunConfig.model_validate({**REQUIRED, "hardware": {"scan": {"gpus": 4}}})
    assert "hardware" not in settings.pipeline_arguments()["settings"]


def test_a_budget_counts_the_stages_on_gpus() -> None:
    (document, _) = yaml.safe_load_all(DEFAULT_PIPELINE_YAML.read_text())
    for stage in STAGES:
        config = getattr(importlib.import_module(f"semiscale.stages.{stage}.stage"), f"{stage.capitalize()}Config")
        assert config.on_device == ("accelerator" in container_of([document], stage)["resources"]), stage
