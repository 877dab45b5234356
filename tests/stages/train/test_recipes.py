"""Compare the recipes with values computed by hand.

The values are from section 4.1 and the supplement's tables 11 to 13.
"""

from pathlib import Path

import pytest
from pydantic import ValidationError

from semiscale.config.run_config import RunConfig
from semiscale.stages.train.config import TrainConfig
from semiscale.stages.train.recipes import RECIPES, Recipe, RecipeName, learning_rate_at

# 0.6.
PEAK = 0.1 / 256 * 1536
BILLION = 1_000_000_000


def compute_rate(recipe: Recipe, images: int, total: int) -> float:
    """Return the learning rate of a recipe with its own rate and batch size."""
    return learning_rate_at(recipe, recipe.learning_rate, recipe.batch_size, images, total)


@pytest.mark.parametrize(
    ("images", "rate"),
    [
        # "a warm-up from 0.1 to 0.1/256 x 1536".
        (0, 0.1),
        (3_200_000, (0.1 + PEAK) / 2),
        (6_400_000, PEAK),
        # There are 13 reductions. This is the last image of the first of 14 parts.
        (BILLION // 14, PEAK),
        (BILLION // 14 + 1, PEAK / 2),
        (BILLION * 7 // 14, PEAK / 2**7),
        (BILLION - 1, PEAK / 2**13),
    ],
)
def test_the_rate_of_pretraining(images: int, rate: float) -> None:
    assert learning_rate_at(RECIPES["pretrain"], 0.1, 1536, images, BILLION) == pytest.approx(rate)


@pytest.mark.parametrize("part", range(1, 14))
def test_pretraining_reduces_the_rate_at_every_14th_part(part: int) -> None:
    # A 14th of 1,400 images is 100. The reduction is at the first image of the next part.
    before, after = (compute_rate(RECIPES["pretrain"], images, 1400) for images in (part * 100 - 1, part * 100))
    assert (before, after) == pytest.approx((PEAK / 2 ** (part - 1), PEAK / 2**part))


@pytest.mark.parametrize("name", ["teacher", "baseline"])
@pytest.mark.parametrize(
    ("images", "rate"),
    # 90 epochs of 80 images have five epochs of warm-up and a reduction after every quarter, 22.5 epochs.
    [
        *[(0, 0.1), (200, 0.35), (399, 0.59875), (400, 0.6), (1799, 0.6)],
        *[(1800, 0.06), (3599, 0.06), (3600, 0.006), (5399, 0.006), (5400, 0.0006), (7199, 0.0006)],
    ],
)
def test_the_rate_of_supervised_training(name: RecipeName, images: int, rate: float) -> None:
    assert compute_rate(RECIPES[name], images, 7200) == pytest.approx(rate)


@pytest.mark.parametrize(("quarter", "rate"), [(0, 0.0015), (1, 0.00015), (2, 0.000015), (3, 0.0000015)])
def test_finetuning_has_three_drops_by_ten_and_no_warmup(quarter: int, rate: float) -> None:
    # 0.00025/256 x 1536 = 0.0015.
    for images in (quarter * 100, quarter * 100 + 99):
        assert learning_rate_at(RECIPES["finetune"], 0.00025, 1536, images, 400) == pytest.approx(rate)


# Recipe, number of epochs, and the rate at the first image of some epochs. An epoch has 1,000 images.
VIDEO_AND_TRANSFER = [
    # Table 12: 1.6e-1/256 x 2048 = 3.2e-1/256 x 1024 = 1.28. 40 epochs of warm-up, [40] x 3, 180 in all.
    ("video-supervised-8", 180, [(0, 0.16), (20, 0.72), (40, 1.28), (79, 1.28), (80, 0.128), (119, 0.128)]),
    ("video-supervised-8", 180, [(120, 0.0128), (159, 0.0128), (160, 0.00128), (179, 0.00128)]),
    ("video-supervised-32", 180, [(0, 0.32), (40, 1.28), (80, 0.128), (120, 0.0128), (160, 0.00128)]),
    # 4.8e-4/256 x 2048 = 9.6e-4/256 x 1024 = 0.00384. 16 epochs of warm-up, [16] x 3, 72 in all.
    ("video-finetune-8", 72, [(0, 0.00048), (8, 0.00216), (16, 0.00384), (31, 0.00384), (32, 0.000384)]),
    ("video-finetune-8", 72, [(47, 0.000384), (48, 0.0000384), (63, 0.0000384), (64, 0.00000384), (71, 0.00000384)]),
    ("video-finetune-32", 72, [(0, 0.00096), (16, 0.00384), (32, 0.000384), (48, 0.0000384), (64, 0.00000384)]),
    # 16 epochs of warm-up, [28] x 3, 100 in all. The third reduction is at the end.
    ("video-finetune-weak-8", 100, [(0, 0.00048), (16, 0.00384), (43, 0.00384), (44, 0.000384), (71, 0.000384)]),
    ("video-finetune-weak-8", 100, [(72, 0.0000384), (99, 0.0000384)]),
    # Table 13: 0.0025/256 x 768 = 0.0075, 300 epochs, [100] x 3, no warm-up stated.
    ("transfer", 300, [(0, 0.0075), (99, 0.0075), (100, 0.00075), (199, 0.00075), (200, 0.000075), (299, 0.000075)]),
]


@pytest.mark.parametrize(("name", "epochs", "rates"), VIDEO_AND_TRANSFER)
def test_the_rates_of_tables_12_and_13(name: RecipeName, epochs: int, rates: list[tuple[int, float]]) -> None:
    recipe = RECIPES[name]
    assert recipe.epochs == epochs
    computed = [compute_rate(recipe, epoch * 1000, epochs * 1000) for epoch, _ in rates]
    assert computed == pytest.approx([rate for _, rate in rates])


@pytest.mark.parametrize(("frames", "batch", "clips", "peak"), [(8, 2048, 16, 0.512), (32, 1024, 8, 0.256)])
def test_the_batches_and_rates_of_table_11(frames: int, batch: int, clips: int, peak: float) -> None:
    recipe = RECIPES["video-pretrain-8" if frames == 8 else "video-pretrain-32"]
    assert (recipe.batch_size, recipe.device_batch_size) == (batch, clips)
    assert recipe.images_processed == 490_000_000
    rates = [compute_rate(recipe, images, 490_000_000) for images in (0, 35_000_000, 455_000_000)]
    assert rates == pytest.approx([0.064, peak / 2, peak / 2**13])


@pytest.mark.parametrize(
    ("images", "rate"),
    # The peak is 0.5 for 1,024 images. The warm-up from 1 % has 5 of 600 epochs, and half a cosine follows.
    [(0, 0.005), (2_500, 0.2525), (5_000, 0.5), (302_500, 0.25), (600_000, 0.0)],
)
def test_the_rate_of_the_modern_recipe(images: int, rate: float) -> None:
    assert compute_rate(RECIPES["modern"], images, 600_000) == pytest.approx(rate, abs=1e-12)


def test_the_batch_of_a_gpu_is_that_of_the_source() -> None:
    """Check the images that each GPU normalizes at a time, and the number of GPUs.

    Section 4.1 has 24 images. Table 11 has 128 GPUs with 16 clips of 8 frames or 8 clips of 32 frames. The reference of
    torchvision has 8 GPUs with 128 images.
    """
    for name, recipe in RECIPES.items():
        expected = {"8": 16, "32": 8}.get(name.rpartition("-")[2], 128 if name == "modern" else 24)
        assert recipe.device_batch_size == expected, name
        gpus = {16: 128, 8: 128, 128: 8}.get(expected, 32 if name == "transfer" else 64)
        assert recipe.batch_size == gpus * expected, name


def test_the_weight_decay_is_that_of_the_source() -> None:
    decays = {name: recipe.weight_decay for name, recipe in RECIPES.items()}
    assert decays.pop("transfer") == 0.001
    assert decays.pop("modern") == 0.00002
    assert set(decays.values()) == {0.0001}


def test_a_small_minibatch_does_not_start_above_its_peak_rate() -> None:
    rates = [learning_rate_at(RECIPES["pretrain"], 0.1, 64, images, 100_000) for images in range(0, 100_000, 64)]
    assert max(rates) == rates[0] == pytest.approx(0.1 * 64 / 256)
    assert rates == sorted(rates, reverse=True)


def test_the_number_of_reductions_does_not_depend_on_the_length() -> None:
    for total in (1_400, 140_000, 140_000_000):
        rates = {
            learning_rate_at(RECIPES["pretrain"], 0.1, 256, total * part // 280 + 1, total) for part in range(10, 280)
        }
        assert len(rates) == 14


def test_the_defaults_of_the_run_file_are_those_of_the_recipes() -> None:
    default = {name: field.default for name, field in RunConfig.model_fields.items()}
    for name in ("pretrain", "teacher"):
        recipe = RECIPES[name]
        assert default[f"{name}_learning_rate"] == recipe.learning_rate
        assert default[f"{name}_images_processed"] == recipe.images_processed
    assert default["finetune_learning_rates"][0] == RECIPES["finetune"].learning_rate
    assert default["finetune_epochs"] == RECIPES["finetune"].epochs


def build_config(tmp_path: Path, **changes: object) -> TrainConfig:
    """Return a config of the required fields and some others."""
    required = {"workdir": str(tmp_path), "recipe": "transfer", "architecture": "resnet50", "plan": "plan.json"}
    return TrainConfig.model_validate({**required, "resolution": 224, "augmentation": "crop-flip", **changes})


def test_numbers_that_are_not_given_are_those_of_the_recipe(tmp_path: Path) -> None:
    bare = build_config(tmp_path)
    assert (bare.learning_rate, bare.batch_size, bare.weight_decay) == (0.0025, 768, 0.001)
    assert bare.device_batch_size == 24
    assert build_config(tmp_path, recipe="video-pretrain-32", device_batch_size=-1).device_batch_size == 8
    assert (bare.images_processed, bare.epochs) == (0, 300)
    given = build_config(
        tmp_path, learning_rate=0.01, batch_size=32, weight_decay=0.0, images_processed=1000, device_batch_size=2
    )
    assert given.device_batch_size == 2
    assert (given.learning_rate, given.batch_size, given.weight_decay) == (0.01, 32, 0.0)
    assert (given.images_processed, given.epochs) == (1000, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "fast"},
        {"device_batch_size": 0},
        {"batch_size": 0},
        {"weight_decay": -2},
        {"learning_rate": float("inf")},
        {"learning_rate": 0},
        {"seed": -1},
        {"checkpoint_minutes": -1},
        {"checkpoint_minutes": float("nan")},
    ],
)
def test_bad_numbers_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build_config(tmp_path, **change)
