"""Test that the digests of the stages' configs are those of version 0.1.0.

The digests name the objects in a workdir.
"""

import json

from tests.golden import expected, passing, program
from tests.golden.bucket import NAME, Bucket
from tests.golden.passing import Fields, Receipts

WEIGHTS = f"s3://{NAME}/files/weights.pth"
LISTED = f"s3://{NAME}/files/list.txt"
FILES = {"files/weights.pth": b"these bytes are never read as weights", "files/list.txt": b"one\ntwo\nthree\n"}
# Values that the run files had when the digests were taken.
KEYS_OF_0_1_0: dict[str, Fields] = {"paper": {"pods": 64}}
# Each run has a name, a run file, and the keys that it changes.
RUNS: dict[str, tuple[str, Fields]] = {
    "demo": ("demo", {}),
    "paper": ("paper", {}),
    "weights from elsewhere": ("demo", {"teacher_start_weights": WEIGHTS, "student_start_weights": WEIGHTS}),
    "ready-made teacher": ("demo", {"teacher_checkpoint": WEIGHTS, "teacher_classes": LISTED}),
    "numbers of the recipes": ("paper", {"batch_size": -1, "device_batch_size": -1, "weight_decay": -1.0}),
    "modern baseline": (
        "paper",
        {"baseline_recipe": "modern", "batch_size": -1, "device_batch_size": -1, "weight_decay": -1.0},
    ),
    "videos": (
        "paper",
        {
            "frames": 8,
            "teacher_frames": 32,
            "teacher_architecture": "r2plus1d_34",
            "student_architecture": "r2plus1d_18",
            "batch_size": -1,
            "device_batch_size": -1,
        },
    ),
    "other keys": (
        "demo",
        {
            "image_column": "picture",
            "label_column": "tag",
            "decoder": "gpu",
            "remove": LISTED,
            "seed": 7,
            "packed_tar_bytes": 1 << 20,
            "retrain_above": 0.25,
            "max_failed_fraction": 0.5,
            "budget_hours": 12.5,
            "pods": 3,
            "promotion": "never",
            "champion": "birds",
        },
    ),
}


def parameters_of(name: str) -> Fields:
    """Return the parameters of one of the runs."""
    run_file, changes = RUNS[name]
    parameters = program.parameters(program.ROOT / "manifests" / "runs" / f"{run_file}.yaml")
    return {**parameters, **KEYS_OF_0_1_0.get(run_file, {}), **changes}


def write_receipts(bucket: Bucket, run: Fields, archived: dict[str, bytes]) -> Receipts:
    """Write the receipts of the old workdir with the parameters of a run."""
    folder = "work/golden/receipts/"
    for key in (key for key in archived if key.startswith(folder)):
        content = json.loads(archived[key])
        if key.endswith("/plan.json"):
            content |= {"name": run["name"], "run": run}
        bucket.write(f"receipts/{key.removeprefix(folder)}", json.dumps(content).encode())

    def uri(name: str) -> str:
        return f"s3://{NAME}/receipts/{name}.json"

    return Receipts(
        plan=uri("plan"),
        teacher=uri("teacher"),
        scores=[uri("scores-000")],
        selection=uri("selection"),
        packed=uri("packed"),
        pretrained=uri("pretrained"),
        students=[uri("students-000"), uri("students-001")],
        baselines=[uri("baselines-000"), uri("baselines-001")],
        evaluation=uri("evaluation"),
        promotion=uri("promotion"),
    )


def configs(run: Fields, receipts: Receipts) -> dict[str, tuple[str, Fields]]:
    """Return the stage and the fields of every config of a run by name."""
    return {
        "plan": ("plan", passing.plan(run)),
        "teacher": ("train", passing.teacher(run, receipts)),
        "pretrain": ("train", passing.pretrain(run, receipts)),
        **{
            f"finetune at {rate:g}": ("train", passing.finetune(run, receipts, rate))
            for rate in run["finetune_learning_rates"]
        },
        **{
            f"baseline at {rate:g}": ("train", passing.baseline(run, receipts, rate))
            for rate in run["baseline_learning_rates"]
        },
        "transfer": ("train", passing.transfer(run, receipts, WEIGHTS)),
        "transfer, fc-only": ("fc-only", passing.fc_only(run, receipts, WEIGHTS)),
        "count of unscored shards": ("count-unscored", passing.count_unscored(run, receipts)),
        "score, pod 0": ("score", passing.score(run, receipts, 0)),
        "score, pod 1": ("score", passing.score(run, receipts, 1)),
        "merge": ("merge", passing.merge(run, receipts)),
        "count of unpacked tars": ("count-unpacked", passing.count_unpacked(run, receipts)),
        "pack, pod 0": ("pack", passing.pack(run, receipts, 0)),
        "pack, pod 1": ("pack", passing.pack(run, receipts, 1)),
        "evaluate": ("evaluate", passing.evaluate(run, receipts)),
        "promote": ("promote", passing.promote(run, receipts)),
        "report": ("report", passing.report(run, receipts)),
    }


def digests_of(bucket: Bucket, name: str, archived: dict[str, bytes]) -> dict[str, str]:
    """Return the digests of all configs of a run."""
    run = parameters_of(name)
    receipts = write_receipts(bucket, run, archived)
    digests = {label: program.digest(*config) for label, config in configs(run, receipts).items()}
    return {**digests, "family of selections": program.selection_family(passing.merge(run, receipts))}


def test_config_digests_are_unchanged(golden_bucket: Bucket, archived: dict[str, bytes]) -> None:
    golden_bucket.fill(FILES)
    expected.check_equal("digests", {name: digests_of(golden_bucket, name, archived) for name in RUNS})


def test_run_file_keys_keep_their_names_and_defaults() -> None:
    expected.check_nothing_lost("run_file_keys", program.default_parameters())
