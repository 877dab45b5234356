"""What must stay equal: contracts and configs, run file and pipeline, the graph and its compiled form."""

import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest
import yaml

import pipeline
from semiscale.cli.compile import DEFAULT_PIPELINE_YAML
from semiscale.config.run_parameters import RunParameters
from semiscale.runtime.stage_config import StageConfig

STAGES = ("plan", "train", "score", "merge", "pack", "evaluate", "promote", "report")
# What decides a fan-out's width stands with its stage: it looks for the same finished work.
COUNTS = {"count_unscored": ("score", "ScoreFanoutConfig"), "count_unpacked": ("pack", "PackFanoutConfig")}
OUTPUTS = {"receipt", "page", "summary", "metrics", "confusion"}
# Parameters of a program that its component leaves at their defaults: controls, not the paper's pipeline.
ONLY_PROGRAM = {
    "train": {"checkpoint_minutes"},
    "merge": {"random_images", "seed", "min_probability"},
    "promote": {"force"},
}


def config_of(stage: str) -> type[StageConfig]:
    """Find the config of a stage, or of a count, by its name."""
    folder, name = COUNTS.get(stage, (stage, f"{stage.capitalize()}Config"))
    module = "config" if stage in COUNTS else "stage"
    found = getattr(importlib.import_module(f"semiscale.stages.{folder}.{module}"), name)
    assert isinstance(found, type)
    assert issubclass(found, StageConfig)
    return found


def component_of(stage: str) -> Any:
    """Find the component of a stage, or of a count, by its name."""
    folder, _ = COUNTS.get(stage, (stage, ""))
    return getattr(importlib.import_module(f"components.{folder}.component"), stage)


@pytest.mark.parametrize("stage", [*STAGES, *COUNTS])
def test_the_component_takes_what_the_config_has(stage: str) -> None:
    taken = set(inspect.signature(component_of(stage).python_func).parameters) - OUTPUTS
    assert taken == set(config_of(stage).model_fields) - ONLY_PROGRAM.get(stage, set())


@pytest.mark.parametrize("stage", [*STAGES, *COUNTS])
def test_the_ui_shows_what_every_stage_did(stage: str) -> None:
    outputs = component_of(stage).component_spec.outputs
    shown = {"page": "system.HTML"} if stage == "report" else {"summary": "system.Markdown"}
    assert {name: outputs[name].type.partition("@")[0] for name in shown} == shown


@pytest.mark.parametrize("stage", [*STAGES, *COUNTS])
def test_defaults_of_component_and_config_agree(stage: str) -> None:
    for name, parameter in inspect.signature(component_of(stage).python_func).parameters.items():
        if parameter.default not in (inspect.Parameter.empty, None):
            assert parameter.default == config_of(stage).model_fields[name].default, name


def test_the_run_file_is_the_pipelines_parameters() -> None:
    parameters = inspect.signature(pipeline.semiscale.pipeline_func).parameters
    assert list(parameters) == [
        *("name", "workdir", "labeled", "unlabeled", "test"),
        *(name for name in parameters if name not in ("name", "workdir", "labeled", "unlabeled", "test")),
    ]
    assert set(parameters) == set(RunParameters.model_fields)
    for name, field in RunParameters.model_fields.items():
        default = parameters[name].default
        assert (default is inspect.Parameter.empty) == field.is_required(), name
        assert field.is_required() or default == field.default, name


def test_a_run_file_of_the_defaults_gives_kfp_the_types_it_checks() -> None:
    """kfp refuses an integer where the pipeline takes a float."""
    settings = RunParameters(name="n", workdir="w", labeled=["l"], unlabeled=["u"], test=["t"])
    for name, parameter in inspect.signature(pipeline.semiscale.pipeline_func).parameters.items():
        if parameter.annotation is float:
            assert isinstance(getattr(settings, name), float), name


def test_every_parameter_is_described_to_the_ui_in_the_run_files_words() -> None:
    documented = pipeline.semiscale.pipeline_func.__doc__ or ""
    for name, field in RunParameters.model_fields.items():
        assert f"        {name}: {field.description}\n" in documented, name


def test_the_ui_describes_every_input_and_output() -> None:
    compiled = yaml.safe_load(DEFAULT_PIPELINE_YAML.read_text().partition("\n---")[0])
    form = compiled["root"]["inputDefinitions"]["parameters"]
    described = {name: " ".join(one["description"].split()) for name, one in form.items()}
    assert described == {name: field.description for name, field in RunParameters.model_fields.items()}
    for name, component in compiled["components"].items():
        if "executorLabel" not in component or name == "comp-plan":  # the plan's parameters are the form's
            continue
        groups = [component["inputDefinitions"], component["outputDefinitions"]]
        given = {key: one for group in groups for kind in group.values() for key, one in kind.items()}
        assert [key for key, one in given.items() if not one.get("description")] == [], name


def test_a_scheduled_run_lists_the_buckets_anew() -> None:
    """kfp keys its cache by parameters, which are the same every night."""
    compiled = yaml.safe_load(DEFAULT_PIPELINE_YAML.read_text().partition("\n---")[0])
    tasks = compiled["root"]["dag"]["tasks"]
    assert not tasks["plan"]["cachingOptions"].get("enableCache")
    assert not tasks["promote"]["cachingOptions"].get("enableCache"), "the champion is no parameter"


def test_the_papers_defaults() -> None:
    defaults = {name: field.default for name, field in RunParameters.model_fields.items()}
    assert defaults["classes_per_image"] == 10
    assert defaults["images_per_class"] == 16_000
    assert defaults["pretrain_images_processed"] == 1_000_000_000
    # Left to the recipes, whose own they are: tests/stages/train/test_recipes.py.
    assert {defaults[name] for name in ("batch_size", "device_batch_size", "weight_decay")} == {-1}
    assert defaults["finetune_learning_rates"][0] == 0.00025
    assert (defaults["teacher_architecture"], defaults["student_architecture"]) == ("resnext101_32x48d", "resnet50")


def test_contracts_import_nothing_that_runs() -> None:
    script = "import pipeline, sys; print(sorted({'torch', 'pyarrow', 'numpy', 'boto3', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_counts_run_where_there_is_no_torch() -> None:
    """The scan's stands beside what scores, and runs in the smaller image."""
    script = "import semiscale.stages.score.fanout, semiscale.stages.pack.fanout, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_from_a_shell(stage: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"semiscale.stages.{stage}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in config_of(stage).model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout
