"""The verb `plan`: estimate time, cost and requests of a run before anything is spent."""

import argparse
from pathlib import Path

from semiscale.cli import rates
from semiscale.cli.command import Command, Options, non_negative_float, non_negative_int
from semiscale.cli.cost_model import GB, InputSizes, RunCost, StageCost, estimate_run
from semiscale.cli.rates import MEASURABLE_RATES, RATED_MODELS, Rate, RateOverrides
from semiscale.cli.throughput_probe import (
    measure_device_rates,
    measure_inputs,
    measure_throughput,
    require_torch,
)
from semiscale.common.cpu import available_cpus
from semiscale.common.errors import InvalidInputError
from semiscale.common.text import count_noun
from semiscale.config import architectures, run_config, yaml_file
from semiscale.config.run_config import RunConfig
from semiscale.observability import budget
from semiscale.stages.plan.shard_groups import require_unlabeled

SI_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def estimate_cost(path: Path, given: dict[str, object], rates_file: Path | None, classes: int, budget: float) -> None:
    """Print the hours, cost, storage and requests of every stage of a run.

    Args:
        path: The run file.
        given: Rates and prices that options state. They override those of the file.
        rates_file: YAML file of rates and prices.
        classes: Number of classes. 0: count them in the list or in the class folders.
        budget: Highest cost, in the currency of the prices. 0: no limit.

    Raises:
        InvalidInputError: An input is invalid, or the run would exceed the budget.

    Cost:
        A listing of every input. A few hundred images are read and decoded on this machine.
    """
    settings = run_config.load_run_config(path).with_absolute_uris()
    architectures.validate_architectures(settings)
    content = {**(yaml_file.read_yaml_mapping(rates_file) if rates_file else {}), **given}
    stated = rates.parse_rates(content, str(rates_file) if rates_file else "rates")
    if budget and not stated.gpu_price_per_h:
        raise InvalidInputError("SEMI-E434", "--budget: The price of a device is unknown. Give --gpu-price-per-h.")
    require_unlabeled(settings.unlabeled)
    inputs = measure_inputs(settings, classes)
    resolved = resolve_rates(settings, inputs, stated)
    result = estimate_run(settings, inputs, {name: rate.value for name, rate in resolved.items()}, stated)
    print(
        "\n".join(
            [
                *describe_hardware(settings, stated, resolved),
                "",
                *describe_inputs(settings, inputs),
                "",
                *format_cost_table(result, stated),
                "",
                *describe_estimate(settings, result, stated, resolved),
            ]
        )
    )
    check_budget(result, stated, budget, settings.budget_hours)


def resolve_rates(settings: RunConfig, inputs: InputSizes, stated: RateOverrides) -> dict[str, Rate]:
    """Return every rate, and measure only those that are not stated.

    The rates of a model are measured if this machine has a GPU. Otherwise they are published rates, or measured on
    the CPU for an architecture that is not in the published table.

    Args:
        settings: The run file.
        inputs: Sizes of its inputs.
        stated: Rates that the user stated.

    Raises:
        InvalidInputError: A rate must be measured, and torch is not installed.
    """
    values = {name: getattr(stated, name) for name in MEASURABLE_RATES}
    resolved = {name: Rate(value, "stated") for name, value in values.items() if value is not None}
    # Published rates are those of a GPU that this machine lacks.
    if not budget.count_gpus():
        for model in RATED_MODELS:
            published = rates.published_rates(getattr(settings, f"{model}_architecture"), settings.resolution)
            resolved = {**{f"{model}_{mode}_images_per_s": rate for mode, rate in published.items()}, **resolved}
    if missing := [name for name in MEASURABLE_RATES if name not in resolved]:
        require_torch(missing)
    if not {"decode_images_per_s", "read_bytes_per_s"} <= resolved.keys():
        probe = measure_throughput(settings)
        resolved = {"decode_images_per_s": probe.decode, "read_bytes_per_s": probe.read, **resolved}
    for model in RATED_MODELS:
        names = {mode: f"{model}_{mode}_images_per_s" for mode in ("forward", "train")}
        if not set(names.values()) <= resolved.keys():
            architecture, frames = getattr(settings, f"{model}_architecture"), settings.clip_frames(model)
            measured = measure_device_rates(architecture, settings.resolution, inputs.classes, frames)
            resolved = {**{names[mode]: rate for mode, rate in measured.items()}, **resolved}
    return resolved


def check_budget(result: RunCost, stated: RateOverrides, budget: float, budget_hours: float) -> None:
    """Check that the estimate is within both budgets.

    Args:
        result: Estimate of the run.
        stated: Prices that the user stated.
        budget: Highest cost. 0: no limit.
        budget_hours: Highest device-hours, from the run file. 0: no limit.

    Raises:
        InvalidInputError: The run would exceed a budget.
    """
    cost = result.cost(stated)
    if budget and cost > budget:
        raise InvalidInputError(
            "SEMI-E435",
            f"--budget {budget:g}: The run would cost {cost:,.2f}. Lower K, the lengths of the trainings or the pool.",
        )
    if budget_hours and result.device_hours > budget_hours:
        raise InvalidInputError(
            "SEMI-E436",
            f"budget_hours: The run would take {result.device_hours:,.1f} device-hours and stop at {budget_hours:g}. "
            "Raise it, or lower K, the lengths of the trainings or the pool.",
        )


def describe_hardware(settings: RunConfig, stated: RateOverrides, resolved: dict[str, Rate]) -> list[str]:
    """Return the lines that name the hardware of the estimate, and this machine.

    Args:
        settings: The run file.
        stated: Devices and cores that the user stated.
        resolved: Every rate with its source.
    """
    model_rates = [rate for name, rate in resolved.items() if name.startswith(RATED_MODELS)]
    devices = sorted({rate.device or "unknown, because its rates are stated" for rate in model_rates})
    gpus = budget.count_gpus()
    return [
        f"Device of the estimate: {' and '.join(devices)}. Each has {stated.cpus_per_device:g} CPU cores to decode.",
        f"The estimate is for {count_noun(settings.pods, 'scoring pod')}, "
        f"{count_noun(stated.training_devices, 'device')} per training, and all learning rates in parallel.",
        f"This machine has {count_noun(available_cpus(), 'CPU core')} and "
        f"{count_noun(gpus, 'GPU') if gpus else 'no GPU'}. The time of `semiscale run` on it is not estimated.",
    ]


def describe_inputs(settings: RunConfig, inputs: InputSizes) -> list[str]:
    """Return the lines that describe the inputs of a run."""
    pool, kind = inputs.unlabeled, "video" if settings.frames else "image"
    return [
        f"{settings.name}: about {count_noun(pool.images, f'unlabeled {kind}')} in {count_noun(pool.shards, 'shard')}, "
        f"{si_format(pool.size_bytes)}B ({si_format(pool.image_bytes)}B a{'' if settings.frames else 'n'} {kind})",
        f"labeled {inputs.labeled.images:,}, validation {inputs.validation.images or 'held out'}, "
        f"test {inputs.test.images:,}; {inputs.classes:,} classes",
    ]


def format_cost_table(result: RunCost, stated: RateOverrides) -> list[str]:
    """Return the lines of the table of stages, with their sum."""
    cost_title = "cost" if stated.gpu_price_per_h else "cost*"
    titles = ("hours", "device-h", "read", "kept", "GET", "PUT", cost_title)
    lines = [f"{'stage':10}" + "".join(f"{title:>10}" for title in titles) + "  bound by"]
    lines += [format_cost_row(stage, stated) for stage in result.stages]
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
    return [*lines, format_cost_row(total, stated)]


def format_cost_row(stage: StageCost, stated: RateOverrides) -> str:
    """Return one line of the table."""
    cells = (
        f"{stage.hours:,.2f}",
        f"{stage.device_hours:,.2f}",
        f"{si_format(stage.read_bytes)}B",
        f"{si_format(stage.kept_bytes)}B",
        si_format(stage.reads),
        si_format(stage.writes),
        format_cost(stage.cost(stated)),
    )
    return (f"{stage.name:10}" + "".join(f"{cell:>10}" for cell in cells) + f"  {stage.bound_by}").rstrip()


def format_cost(cost: float) -> str:
    """Format a cost. A cost above 0 is never shown as 0."""
    return "<0.01" if 0 < cost < 0.005 else f"{cost:,.2f}"


def describe_estimate(
    settings: RunConfig, result: RunCost, stated: RateOverrides, resolved: dict[str, Rate]
) -> list[str]:
    """Return the lines that describe the needs of a run and the source of every rate.

    Args:
        settings: The run file.
        result: Estimate of the run.
        stated: Prices that the user stated.
        resolved: Every rate with its source.
    """
    kept = sum(stage.kept_bytes for stage in result.stages)
    short_pool = (
        f"The pool is too small for K = {settings.images_per_class:,} images of every class. A class may have fewer."
    )
    lines = [
        f"{result.selected:,} images are selected at most; the kept objects cost "
        f"{format_cost(kept / GB * stated.storage_price_per_gb_month)} a month (without checkpoints)",
        *([short_pool] if result.is_pool_short else []),
        f"decoding keeps up with the scan on {result.cpus_per_device:,.1f} CPU cores per device; "
        f"--cpus-per-device is {stated.cpus_per_device:g}",
        "rates:",
        *(f"  {name} = {rate.value:,.1f} ({rate.source})" for name, rate in sorted(resolved.items())),
    ]
    return lines if stated.gpu_price_per_h else [*lines, "* without computing: give --gpu-price-per-h"]


def si_format(number: float) -> str:
    """Format a number with an SI prefix, such as `1.5 G`."""
    for scale, prefix in SI_PREFIXES:
        if number >= scale:
            return f"{number / scale:.1f} {prefix}"
    return f"{number:.0f} "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`, with one option for every rate and price."""
    parser.add_argument("run_file", type=Path)
    parser.add_argument(
        "--budget", type=non_negative_float, default=0.0, metavar="MONEY", help="refuse a run that costs more"
    )
    parser.add_argument(
        "--classes", type=non_negative_int, default=0, metavar="N", help="if neither a list nor folders give the number"
    )
    parser.add_argument("--rates", type=Path, metavar="FILE", help="YAML with the names below, underscores for dashes")
    for name, field in RateOverrides.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=field.description)


def execute(options: Options) -> None:
    """Run the verb."""
    given = {name: value for name in RateOverrides.model_fields if (value := getattr(options, name)) is not None}
    estimate_cost(options.run_file, given, options.rates, options.classes, options.budget)


COMMAND = Command(
    help="hours, cost and requests of a run before spending",
    description="Print the hours, cost, storage and requests of every stage of a run, and its bottlenecks, before\n"
    "spending.\n\n"
    "The inputs are listed, and a few hundred images are read and decoded on this machine. The speed of a model is\n"
    "measured if this machine has a GPU, or else taken from a published table. A model that the table lacks is\n"
    "measured on the CPU. Rates that you state override all others. The exit code is 2 if the run would cost more\n"
    "than --budget, or take more device-hours than its budget_hours.",
    examples=(
        "my-run.yaml",
        "my-run.yaml --gpu-price-per-h 2.5 --cpus-per-device 24 --budget 5000",
        "my-run.yaml --rates a100.yaml --teacher-forward-images-per-s 1700",
    ),
    add_arguments=add_arguments,
    execute=execute,
)
