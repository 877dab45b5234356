"""Plan: what a run will take before anything is spent."""

from pathlib import Path

from semiscale.cli import rates
from semiscale.cli.cost_model import GB, InputSizes, RunCost, StageCost, estimate_run
from semiscale.cli.rates import MEASURABLE_RATES, MODELS, Rate, RateOverrides
from semiscale.cli.throughput_probe import measure_device_rates, measure_inputs, measure_throughput
from semiscale.common.errors import InvalidInputError
from semiscale.config import architectures, run_config, yaml_file
from semiscale.config.run_config import RunConfig
from semiscale.observability import budget
from semiscale.stages.plan.shard_groups import require_unlabeled

SCALE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def estimate_cost(path: Path, given: dict[str, object], rates_file: Path | None, classes: int, budget: float) -> None:
    """Print the hours, cost, storage and requests of every stage of a run, and what bounds it, before spending.

    Lists the inputs, and reads and decodes a few hundred images on this machine. A model's speed is measured where this
    machine has a GPU, or else taken from a published table; what the table lacks is measured on the CPU, and what is
    stated goes before all. Exit code 2 where the run would take more than --budget, or more device-hours than its
    budget_hours.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    architectures.validate_architectures(settings)
    content = {**(yaml_file.read_yaml_mapping(rates_file) if rates_file else {}), **given}
    stated = rates.parse_rates(content, str(rates_file) if rates_file else "rates")
    if budget and not stated.gpu_price_per_h:
        raise InvalidInputError("--budget: the price of a device is not known; give --gpu-price-per-h")
    require_unlabeled(settings.unlabeled)
    inputs = measure_inputs(settings, classes)
    found = resolve_rates(settings, inputs, stated)
    result = estimate_run(settings, inputs, {name: rate.value for name, rate in found.items()}, stated)
    print(
        "\n".join(
            [
                *describe_inputs(settings, inputs),
                "",
                *table(result, stated),
                "",
                *describe_estimate(result, stated, found),
            ]
        )
    )
    check_budget(result, stated, budget, settings.budget_hours)


def resolve_rates(settings: RunConfig, inputs: InputSizes, stated: RateOverrides) -> dict[str, Rate]:
    """Return every rate: stated, or measured, or published. Measures only what is asked for."""
    values = {name: getattr(stated, name) for name in MEASURABLE_RATES}
    found = {name: Rate(value, "stated") for name, value in values.items() if value is not None}
    if not {"decode_images_per_s", "read_bytes_per_s"} <= found.keys():
        seen = measure_throughput(settings)
        found = {"decode_images_per_s": seen.decode, "read_bytes_per_s": seen.read, **found}
    for model in MODELS:
        names = {what: f"{model}_{what}_images_per_s" for what in ("forward", "train")}
        if not set(names.values()) <= found.keys():
            architecture = getattr(settings, f"{model}_architecture")
            known = {} if budget.count_gpus() else rates.published_rates(architecture, settings.resolution)
            frames = settings.clip_frames(model)
            measured = known or measure_device_rates(architecture, settings.resolution, inputs.classes, frames)
            found = {**{names[what]: rate for what, rate in measured.items()}, **found}
    return found


def check_budget(result: RunCost, stated: RateOverrides, budget: float, budget_hours: float) -> None:
    """Raise InvalidInputError where the estimate is above a budget."""
    cost = result.cost(stated)
    if budget and cost > budget:
        raise InvalidInputError(
            f"--budget {budget:g}: the run would cost {cost:,.2f}; lower K, the trainings' lengths or the pool"
        )
    if budget_hours and result.device_hours > budget_hours:
        raise InvalidInputError(
            f"budget_hours: {budget_hours:g}, but the run would take {result.device_hours:,.1f} device-hours, and "
            "would stop on the way; set more, or lower K, the trainings' lengths or the pool"
        )


def describe_inputs(settings: RunConfig, inputs: InputSizes) -> list[str]:
    """Say what the run works on."""
    pool, what = inputs.unlabeled, "video" if settings.frames else "image"
    return [
        f"{settings.name}: about {pool.images:,} unlabeled {what}s in {pool.shards:,} shards, "
        f"{si_format(pool.size_bytes)}B ({si_format(pool.image_bytes)}B a{'' if settings.frames else 'n'} {what})",
        f"labeled {inputs.labeled.images:,}, validation {inputs.validation.images or 'held out'}, "
        f"test {inputs.test.images:,}; {inputs.classes:,} classes",
    ]


def table(result: RunCost, stated: RateOverrides) -> list[str]:
    """Return the table of stages, with their sum."""
    priced = "cost" if stated.gpu_price_per_h else "cost*"
    titles = ("hours", "device-h", "read", "kept", "GET", "PUT", priced)
    lines = [f"{'stage':10}" + "".join(f"{title:>10}" for title in titles) + "  bound by"]
    lines += [format_row(stage, stated) for stage in result.stages]
    stages = result.stages
    total = StageCost(
        "total",
        result.hours,
        result.device_hours,
        sum(stage.cpu_hours for stage in stages),
        sum(stage.reads for stage in stages),
        sum(stage.writes for stage in stages),
        sum(stage.read_bytes for stage in stages),
        sum(stage.kept_bytes for stage in stages),
    )
    return [*lines, format_row(total, stated)]


def format_row(stage: StageCost, stated: RateOverrides) -> str:
    """Return one line of the table."""
    cells = (
        f"{stage.hours:,.2f}",
        f"{stage.device_hours:,.2f}",
        f"{si_format(stage.read_bytes)}B",
        f"{si_format(stage.kept_bytes)}B",
        si_format(stage.reads),
        si_format(stage.writes),
        f"{stage.cost(stated):,.2f}",
    )
    return (f"{stage.name:10}" + "".join(f"{cell:>10}" for cell in cells) + f"  {stage.bound_by}").rstrip()


def describe_estimate(result: RunCost, stated: RateOverrides, found: dict[str, Rate]) -> list[str]:
    """Say what to buy, and where every figure comes from."""
    kept = sum(stage.kept_bytes for stage in result.stages)
    lines = [
        f"{result.selected:,} images at most are selected; what is kept costs "
        f"{kept / GB * stated.storage_price_per_gb_month:,.2f} a month (without checkpoints)",
        f"the scan is best fed by {result.cpus_per_device:,.1f} CPU cores a device; this plan has "
        f"{stated.cpus_per_device:g}",
        "rates:",
        *(f"  {name} = {rate.value:,.1f} ({rate.source})" for name, rate in sorted(found.items())),
    ]
    return lines if stated.gpu_price_per_h else [*lines, "* without computing: give --gpu-price-per-h"]


def si_format(number: float) -> str:
    """Write a number in a few characters: 1.5G."""
    for scale, letter in SCALE:
        if number >= scale:
            return f"{number / scale:.1f} {letter}"
    return f"{number:.0f} "
