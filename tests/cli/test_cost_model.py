"""Test the estimates of the verb `plan`, the sources of rates, and budgets."""

import math
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from semiscale.cli import rates
from semiscale.cli.cost_model import InputSizes, SampleSetSize, StageCost, estimate_run
from semiscale.cli.plan import estimate_cost, format_cost, si_format
from semiscale.cli.rates import RateOverrides
from semiscale.cli.throughput_probe import measure_inputs, measure_throughput
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.run_config import RunConfig
from tests.support import sample_images

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = Path(os.environ.get("SEMISCALE_DATA", ROOT.parent / "shared" / "data"))

# The pool has a billion photographs of 100 kB in 100,000 tars. ImageNet has 1.28 million loose files, and
# 50,000 for the test.
POOL = SampleSetSize(1_000_000_000, 100_000_000_000_000, 100_000, 100_000)
IMAGENET = InputSizes(
    labeled=SampleSetSize(1_280_000, 128_000_000_000, 1_280_000, 1_250),
    test=SampleSetSize(50_000, 5_000_000_000, 50, 50),
    validation=SampleSetSize(0, 0, 0, 0),
    unlabeled=POOL,
    classes=1000,
)
RATES = {
    "decode_images_per_s": 600.0,
    "read_bytes_per_s": 1e9,
    "teacher_forward_images_per_s": 1_700.0,
    "teacher_train_images_per_s": 500.0,
    "student_forward_images_per_s": 4_000.0,
    "student_train_images_per_s": 1_000.0,
}
PRICES = RateOverrides(gpu_price_per_h=2.0, cpu_price_per_h=0.05, training_devices=8, cpus_per_device=10)


@pytest.fixture
def paper() -> RunConfig:
    """Return the paper's run file with a hundred pods."""
    return run_config.load_run_config(ROOT / "manifests" / "runs" / "paper.yaml").model_copy(update={"pods": 100})


def estimate_stages(settings: RunConfig, **changed: float) -> dict[str, StageCost]:
    """Estimate the stages of a run on IMAGENET."""
    return {stage.name: stage for stage in estimate_run(settings, IMAGENET, {**RATES, **changed}, PRICES).stages}


def test_the_scan_of_the_paper_agrees_with_hand_calculation(paper: RunConfig) -> None:
    score = estimate_stages(paper)["score"]
    assert score.bound_by == "the device"
    assert score.device_hours == pytest.approx(163.4, abs=0.05), "1e9 / 1,700 / 3,600, as published for an A100"
    assert score.hours == pytest.approx(1.634, abs=0.001)
    assert score.read_bytes == 1e14
    assert score.reads == math.ceil(1e14 / 2**23) + 100_000
    assert score.kept_bytes == pytest.approx(1e10 * 10.3 + 1e9 * 40)
    # The terms are 163.4 h x 2, 12 million GET, 300,000 PUT, and 143 GB for a month.
    assert score.cost(PRICES) == pytest.approx(326.80 + 4.81 + 1.50 + 2.86, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "bound_by", "device_hours"),
    [
        # The hours are 1e9 / (100 x 10) / 3,600.
        ({"decode_images_per_s": 100.0}, "decoding", 277.8),
        # The hours are 1e9 / (5e7 / 1e5) / 3,600.
        ({"read_bytes_per_s": 5e7}, "reading", 555.6),
        ({"teacher_forward_images_per_s": 100.0}, "the device", 2777.8),
    ],
)
def test_the_slowest_part_bounds_the_rate(
    paper: RunConfig, changes: dict[str, float], bound_by: str, device_hours: float
) -> None:
    score = estimate_stages(paper, **changes)["score"]
    assert (score.bound_by, round(score.device_hours, 1)) == (bound_by, device_hours)


def test_the_trainings_of_the_paper_agree_with_hand_calculation(paper: RunConfig) -> None:
    by_name = estimate_stages(paper)
    # Two per cent are held out.
    labeled = round(1_280_000 * 0.98)
    assert by_name["teacher"].device_hours == pytest.approx(115e6 / 500 / 3600)
    assert by_name["pretrain"].device_hours == pytest.approx(1e9 / 1000 / 3600)
    assert by_name["pretrain"].hours == pytest.approx(1e9 / 1000 / 3600 / 8)
    assert by_name["pretrain"].read_bytes == pytest.approx(1e9 * 1e5), "16 million images, 62.5 passes"
    assert by_name["finetune"].device_hours == pytest.approx(3 * 30 * labeled / 1000 / 3600), "at three learning rates"
    assert by_name["finetune"].hours == pytest.approx(30 * labeled / 1000 / 3600 / 8), "side by side"
    assert by_name["baseline"].device_hours == pytest.approx(3 * (1e9 + 30 * labeled) / 1000 / 3600)
    assert by_name["evaluate"].device_hours == pytest.approx((50_000 / 1700 + 3 * 50_000 / 4000) / 3600)
    on_clips = paper.model_copy(update={"frames": 8, "teacher_frames": 32})
    assert estimate_stages(on_clips)["evaluate"].reads == 2 * by_name["evaluate"].reads, (
        "each length is cropped separately"
    )


def test_a_ready_made_teacher_costs_nothing(paper: RunConfig) -> None:
    ready_made = paper.model_copy(update={"teacher_checkpoint": "gs://b/teacher.pth"})
    teacher, score = (estimate_stages(ready_made)[stage] for stage in ("teacher", "score"))
    assert teacher == StageCost("teacher")
    assert score == estimate_stages(paper)["score"]


def test_a_set_that_fits_in_memory_is_read_once_by_every_device(paper: RunConfig) -> None:
    small = replace(IMAGENET, labeled=SampleSetSize(1_000, 100_000_000, 1_000, 1))
    by_name = {stage.name: stage for stage in estimate_run(paper, small, RATES, PRICES).stages}
    assert (by_name["teacher"].read_bytes, by_name["teacher"].reads) == (8 * 100_000_000, 8 * 1_000)


def test_selection_and_pack_agree_with_hand_calculation(paper: RunConfig) -> None:
    estimate = estimate_run(paper, IMAGENET, RATES, PRICES)
    pack = next(stage for stage in estimate.stages if stage.name == "pack")
    assert (estimate.selected, estimate.is_pool_short) == (16_000_000, False)
    assert (pack.reads, pack.writes) == (16_000_000, 1602)
    assert pack.read_bytes == pack.kept_bytes == 1.6e12
    assert pack.hours == pytest.approx(1600 / 3600)
    small = paper.model_copy(update={"images_per_class": 10**9, "classes_per_image": 2})
    limited = estimate_run(small, IMAGENET, RATES, PRICES)
    assert (limited.selected, limited.is_pool_short) == (2 * 10**9, True), "no more than P of each image"


def test_totals_are_sums_of_the_stages(paper: RunConfig) -> None:
    estimate = estimate_run(paper, IMAGENET, RATES, PRICES)
    assert estimate.cpus_per_device == pytest.approx(1700 / 600)
    assert estimate.device_hours == pytest.approx(sum(stage.device_hours for stage in estimate.stages))
    assert estimate.cost(PRICES) == pytest.approx(sum(stage.cost(PRICES) for stage in estimate.stages))
    by_name = {stage.name: stage.hours for stage in estimate.stages}
    chain = sum(by_name[name] for name in ("teacher", "score", "merge", "pack", "pretrain", "finetune"))
    assert chain > by_name["baseline"]
    assert estimate.hours == pytest.approx(by_name["plan"] + chain + by_name["evaluate"])


def test_published_rates_agree_with_the_published_training_rates() -> None:
    """timm's tables have training rates on the same GPU.

    ResNeXt-50 has 1,001 and ResNeXt-101 32x4d has 609 images a second.
    """
    for architecture, train in (("resnext50_32x4d", 1001), ("resnext101_32x4d", 609)):
        assert rates.published_rates(architecture, 224)["train"].value == pytest.approx(train, rel=0.02)
    assert rates.published_rates("resnet50", 448)["forward"].value == pytest.approx(3669 / 4)
    assert rates.published_rates("resnet8_small", 224) == {}


def write_run_file(folder: Path, **changes: Any) -> Path:
    """Write the images of a small run and its run file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sample_images.write_run(folder, **changes)))
    return path


def test_sets_are_counted_by_listing_and_by_a_few_images(tmp_path: Path) -> None:
    settings = run_config.load_run_config(write_run_file(tmp_path)).with_absolute_uris()
    inputs = measure_inputs(settings, 0)
    assert inputs.classes == 3
    assert (inputs.labeled.images, inputs.labeled.objects) == (12, 12)
    assert (inputs.validation.images, inputs.validation.objects) == (12, 1), "a Parquet file tells its rows"
    assert inputs.unlabeled.shards == 3
    assert inputs.unlabeled.images == pytest.approx(120, rel=0.2), "tiny images: what the tars end in counts"
    throughput = measure_throughput(settings)
    assert (throughput.samples, throughput.failed) == (120, 0)
    assert throughput.decode.value > 0
    assert "measured here on 120 images" in throughput.decode.source


def test_images_that_parquet_files_link_are_counted_and_measured_like_files(tmp_path: Path) -> None:
    links = sorted(str(path) for path in sample_images.write_folders(tmp_path / "images", 70).rglob("*.png"))
    (tmp_path / "links").mkdir()
    # There are more files than the estimate opens.
    for number in range(12):
        pq.write_table(pa.table({"image": links}), tmp_path / "links" / f"{number}.parquet")
    pool = measure_inputs(
        run_config.load_run_config(write_run_file(tmp_path, unlabeled=[str(tmp_path / "links")])).with_absolute_uris(),
        0,
    ).unlabeled
    assert (pool.images, pool.objects, pool.shards) == (12 * 210, 12 * 211, 12)
    size_bytes = sum(path.stat().st_size for path in [*map(Path, links), tmp_path / "links" / "0.parquet"])
    assert pool.size_bytes == pytest.approx(12 * size_bytes, rel=0.1)


def test_a_pool_of_few_images_is_counted_exactly(tmp_path: Path) -> None:
    pool = sample_images.write_pool(tmp_path / "one", shards=1, per_shard=60)
    settings = run_config.load_run_config(write_run_file(tmp_path, unlabeled=[str(pool)])).with_absolute_uris()
    assert measure_inputs(settings, 0).unlabeled.images == 60


def test_photographs_in_tars_are_counted_to_a_tenth(tmp_path: Path) -> None:
    tars = sorted(PHOTOGRAPHS.glob("photos/*.tar"))
    if not tars:
        pytest.skip("no photographs next to this checkout")
    settings = run_config.load_run_config(
        write_run_file(tmp_path, unlabeled=[str(PHOTOGRAPHS / "photos")])
    ).with_absolute_uris()
    images = 0
    for path in tars:
        with tarfile.open(path) as tar:
            images += sum(name.endswith(".jpg") for name in tar.getnames())
    assert measure_inputs(settings, 0).unlabeled.images == pytest.approx(images, rel=0.1)


STATED = {
    name: 100.0
    for name in RATES
    if name not in ("decode_images_per_s", "read_bytes_per_s")
}  # fmt: skip


def test_a_plan_is_printed_with_the_sources_of_its_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump({**STATED, "gpu_price_per_h": 2}))
    estimate_cost(write_run_file(tmp_path), {"cpus_per_device": 4}, tmp_path / "rates.yaml", classes=0, budget=0)
    out = capsys.readouterr().out
    assert "labeled 12, validation" in out
    assert "teacher_forward_images_per_s = 100.0 (stated)" in out
    assert "decode_images_per_s" in out.split("rates:")[1]
    assert "measured here on 120 images, one core" in out
    assert "--cpus-per-device is 4" in out
    assert out.startswith(
        "Device of the estimate: unknown, because its rates are stated. Each has 4 CPU cores to decode."
    )
    titles, *rows = (line for line in out.split("\n\n")[2].splitlines())
    assert titles.split()[:3] == ["stage", "hours", "device-h"]
    assert [row.split()[0] for row in rows] == [
        *("plan", "teacher", "score", "merge", "pack", "pretrain", "finetune", "baseline", "evaluate", "total"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "overrides", "budget", "line"),
    [
        ({}, {**STATED, "gpu_price_per_h": 1e6}, 10.0, "--budget 10: .*SEMI-E435"),
        ({}, STATED, 10.0, "SEMI-E434"),
        ({"budget_hours": 0.001}, STATED, 0.0, "budget_hours: .*SEMI-E436"),
        ({}, {**STATED, "decode_images_per_s": -1}, 0.0, "rates: decode_images_per_s: .*SEMI-E100"),
        ({"test": "/nowhere"}, STATED, 0.0, "/nowhere: nothing here"),
        ({"classes": "", "labeled": ["{pool}"]}, STATED, 0.0, "SEMI-E437"),
        (
            {"classes": "/nowhere.txt"},
            STATED,
            0.0,
            "classes: /nowhere.txt.*SEMI-E134",
        ),
    ],
)
def test_a_plan_with_bad_input_or_over_budget_is_refused(
    tmp_path: Path, changes: dict[str, Any], overrides: dict[str, object], budget: float, line: str
) -> None:
    path = write_run_file(tmp_path, **changes)
    path.write_text(path.read_text().replace("'{pool}'", str(tmp_path / "data" / "pool")))
    with pytest.raises(InvalidInputError, match=line) as refusal:
        estimate_cost(path, overrides, None, classes=0, budget=budget)
    assert "\n" not in str(refusal.value)


def plan_without_torch(run_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `semiscale plan` in a process that cannot import torch."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "from semiscale.cli.main import main\n"
        "sys.exit(main(None, sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "plan", str(run_file), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_plan_needs_no_torch_if_no_rate_is_measured(tmp_path: Path) -> None:
    options = [f"--{name.replace('_', '-')}=100" for name in RATES]
    planned = plan_without_torch(write_run_file(tmp_path), *options)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "total" in planned.stdout


def test_a_plan_without_torch_names_the_rates_that_it_cannot_measure(tmp_path: Path) -> None:
    planned = plan_without_torch(write_run_file(tmp_path), "--read-bytes-per-s=1e9")
    assert planned.returncode == 2
    (line,) = planned.stderr.splitlines()
    assert line.endswith("[SEMI-E445]")
    assert "--decode-images-per-s" in line
    assert "--read-bytes-per-s" not in line


def test_a_cost_above_0_is_not_shown_as_0() -> None:
    assert [format_cost(cost) for cost in (0, 0.001, 0.006, 1234.5)] == ["0.00", "<0.01", "0.01", "1,234.50"]


@pytest.mark.parametrize(("number", "text"), [(0, "0 "), (999, "999 "), (1500, "1.5 k"), (1.6e12, "1.6 T")])
def test_numbers_are_shortened_with_si_prefixes(number: float, text: str) -> None:
    assert si_format(number) == text
