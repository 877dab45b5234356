"""Test that the form and the graph follow from the declaration of the parameters."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from semiscale.cli.compile import DEFAULT_PIPELINE_YAML
from semiscale.common.errors import InvalidInputError
from semiscale.config.architectures import validate_architectures
from semiscale.config.form import FORM_KEYS, SETTINGS_DESCRIPTION, from_form, to_form
from semiscale.config.run_config import validate_run_config
from semiscale.config.run_parameters import RunParameters
from semiscale.runtime.stage_config import StageConfig

STAGES = ("plan", "train", "score", "merge", "pack", "evaluate", "promote", "report")
# The config of a fan-out is in the package of its stage, because both look for the same finished work.
COUNTS = {"count_unscored": ("score", "ScoreFanoutConfig"), "count_unpacked": ("pack", "PackFanoutConfig")}
ROOT = Path(__file__).resolve().parents[2]


def find_config(stage: str) -> type[StageConfig]:
    """Return the config class of a stage or a fan-out by its name."""
    folder, name = COUNTS.get(stage, (stage, f"{stage.capitalize()}Config"))
    module = "config" if stage in COUNTS else "stage"
    config = getattr(importlib.import_module(f"semiscale.stages.{folder}.{module}"), name)
    assert isinstance(config, type)
    assert issubclass(config, StageConfig)
    return config


def find_component(stage: str) -> Any:
    """Return the component of a stage or a fan-out by its name."""
    folder, _ = COUNTS.get(stage, (stage, ""))
    return getattr(importlib.import_module(f"components.{folder}.component"), stage)


@pytest.mark.parametrize("stage", [*STAGES, *COUNTS])
def test_the_ui_shows_a_page_or_a_summary_of_every_stage(stage: str) -> None:
    outputs = find_component(stage).component_spec.outputs
    shown = {"page": "system.HTML"} if stage == "report" else {"summary": "system.Markdown"}
    assert {name: outputs[name].type.partition("@")[0] for name in shown} == shown


def test_the_form_has_the_common_keys_and_a_field_for_all_others() -> None:
    fields = inspect.signature(pipeline.semiscale.pipeline_func).parameters
    assert list(fields) == [*FORM_KEYS, "settings"]
    assert len(FORM_KEYS) <= 16
    for name, key in RunParameters.model_fields.items():
        if name in FORM_KEYS and not key.is_required():
            assert fields[name].default == key.default, name


def test_a_run_goes_through_the_form_unchanged() -> None:
    run = RunParameters(
        name="n", workdir="w", labeled=["l"], unlabeled=["u"], test=["t"], resolution=288, decoder="gpu", pods=3
    )
    assert to_form(run)["settings"] == {"resolution": 288, "decoder": "gpu"}
    assert RunParameters.model_validate(from_form(to_form(run))) == run
    # Kubeflow's UI and backend send every number of a dict as a float.
    sent = {**to_form(run), "settings": {"resolution": 288.0, "decoder": "gpu"}}
    assert RunParameters.model_validate(from_form(sent)) == run


@pytest.mark.parametrize("name", ["name", "workdir", "teacher_architecture", "student_architecture"])
def test_a_cleared_text_of_the_form_is_refused(name: str) -> None:
    """Kubeflow's UI sends a text that the user cleared as an empty text, also where the form has no default."""
    form = {"name": "n", "workdir": "w", "labeled": ["l"], "unlabeled": ["u"], "test": ["t"], name: ""}
    with pytest.raises(InvalidInputError) as error:
        validate_architectures(validate_run_config(from_form(form), "form"))
    assert error.value.code == ("SEMI-E151" if name.endswith("architecture") else "SEMI-E100")


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"resolutoin": 64}, "SEMI-E102", "settings.resolutoin: This key is unknown. Did you mean 'resolution'"),
        ({"pods": 4}, "SEMI-E101", "settings.pods"),
        ({"hardware": {}}, "SEMI-E102", "settings.hardware"),
    ],
)
def test_invalid_settings_are_refused_by_name(settings: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        from_form({"name": "n", "settings": settings})
    assert error.value.code == code
    assert str(error.value).startswith(message)


def test_a_new_key_of_a_training_takes_two_edits(tmp_path: Path) -> None:
    """One edit declares the key.

    The other edit adds the field of the training's config.
    """
    shutil.copytree(ROOT / "semiscale", tmp_path / "semiscale", ignore=shutil.ignore_patterns("__pycache__"))
    declaration, use = tmp_path / "semiscale/config/run_parameters.py", tmp_path / "semiscale/stages/train/config.py"
    field = '    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of SGD.")\n'
    declaration.write_text(
        re.sub(r"(?m)^    seed: int = ", field + r"    seed: int = ", declaration.read_text(), count=1)
    )
    used = "    momentum: Annotated[float, OMIT_DEFAULT_FROM_DIGEST] = 0.9\n"
    use.write_text(re.sub(r"(?m)^    seed: Annotated", used + r"    seed: Annotated", use.read_text(), count=1))
    program = """
from semiscale.config.form import from_form, to_form
from semiscale.common.errors import InvalidInputError
from semiscale.config.form import FORM_KEYS, SETTINGS_DESCRIPTION, from_form, to_form
from semiscale.config.run_parameters import RunParameters
from semiscale.stages.train.config import TrainConfig
run = RunParameters(name="n", workdir="w", labeled=["l"], unlabeled=["u"], test=["t"], momentum=0.5)
assert to_form(run)["settings"] == {"momentum": 0.5}
run = RunParameters.model_validate(from_form(to_form(run)))
assert TrainConfig.from_run(run, {"role": "teacher", "plan": "p"}).momentum == 0.5
assert RunParameters.model_json_schema()["properties"]["momentum"]["default"] == 0.9
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_the_ui_describes_every_input_and_output() -> None:
    compiled = yaml.safe_load(DEFAULT_PIPELINE_YAML.read_text().partition("\n---")[0])
    form = compiled["root"]["inputDefinitions"]["parameters"]
    described = {name: " ".join(field["description"].split()) for name, field in form.items()}
    keys = {name: RunParameters.model_fields[name].description for name in FORM_KEYS}
    assert described == {**keys, "settings": SETTINGS_DESCRIPTION}
    for name, component in compiled["components"].items():
        # The parameters of the plan are those of the form.
        if "executorLabel" not in component or name == "comp-plan":
            continue
        groups = [component["inputDefinitions"], component["outputDefinitions"]]
        fields = {key: field for group in groups for kind in group.values() for key, field in kind.items()}
        assert [key for key, field in fields.items() if not field.get("description")] == [], name


def test_the_graph_is_a_chain_with_a_branch_for_the_baseline() -> None:
    """Figure 1 of the paper is a chain of tasks.

    The baseline depends only on the plan.
    """
    compiled = yaml.safe_load(DEFAULT_PIPELINE_YAML.read_text().partition("\n---")[0])
    tasks = compiled["root"]["dag"]["tasks"]
    dependencies = {name: sorted(task.get("dependentTasks", [])) for name, task in tasks.items()}
    names = {name: task["taskInfo"]["name"] for name, task in tasks.items()}
    edges = {names[name]: sorted(names[other] for other in others) for name, others in dependencies.items()}
    assert edges == {
        "Plan": [],
        "1 Train teacher": ["Plan"],
        "Baselines": ["Plan"],
        "2 Count to score": ["1 Train teacher"],
        "2 Score on pods": ["2 Count to score"],
        "2 Merge: top K": ["2 Score on pods"],
        "2 Count to pack": ["2 Merge: top K"],
        "2 Pack on pods": ["2 Count to pack"],
        "2 Packed set": ["2 Count to pack", "2 Pack on pods"],
        "3 Pre-train": ["2 Packed set"],
        "4 Fine-tunings": ["3 Pre-train"],
        "Evaluate": ["4 Fine-tunings", "Baselines"],
        "Promote": ["Evaluate"],
        "Report": ["Promote"],
    }


def test_a_scheduled_run_lists_the_buckets_again() -> None:
    """The cache of kfp depends on parameters, which are the same every night."""
    compiled = yaml.safe_load(DEFAULT_PIPELINE_YAML.read_text().partition("\n---")[0])
    tasks = compiled["root"]["dag"]["tasks"]
    assert not tasks["plan"]["cachingOptions"].get("enableCache")
    assert not tasks["promote"]["cachingOptions"].get("enableCache"), "the champion is no parameter"


def test_the_papers_defaults() -> None:
    defaults = {name: field.default for name, field in RunParameters.model_fields.items()}
    assert defaults["classes_per_image"] == 10
    assert defaults["images_per_class"] == 16_000
    assert defaults["pretrain_images_processed"] == 1_000_000_000
    # The recipes define these values. tests/stages/train/test_recipes.py tests them.
    assert {defaults[name] for name in ("batch_size", "device_batch_size", "weight_decay")} == {-1}
    assert defaults["finetune_learning_rates"][0] == 0.00025
    assert (defaults["teacher_architecture"], defaults["student_architecture"]) == ("resnext101_32x48d", "resnet50")


def test_importing_the_pipeline_loads_no_heavy_package() -> None:
    script = "import pipeline, sys; print(sorted({'torch', 'pyarrow', 'numpy', 'boto3', 'PIL'} & sys.modules.keys()))"
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


def test_the_fanouts_run_without_torch() -> None:
    """The fan-out of scoring runs in the smaller image."""
    script = "import semiscale.stages.score.fanout, semiscale.stages.pack.fanout, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_from_a_shell(stage: str) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", f"semiscale.stages.{stage}", "--help"], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    for name in find_config(stage).model_fields:
        assert f"--{name.replace('_', '-')}" in completed.stdout
