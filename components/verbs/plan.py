"""Plan: what a run will take before anything is spent."""

from pathlib import Path

from components.plan.ledger import refuse_none
from components.shared import architectures, runfile, tasks
from components.shared.errors import Refused
from components.shared.runfile import RunFile
from components.verbs import rates
from components.verbs.estimate import GB, Estimate, Inputs, Stage, estimate
from components.verbs.probe import device_rates, inputs_of, probe
from components.verbs.rates import MEASURED, MODELS, Rate, Stated

SCALE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plan(path: Path, given: dict[str, object], rates_file: Path | None, classes: int, budget: float) -> None:
    """Print the hours, cost, storage and requests of every stage of a run, and what bounds it, before spending.

    Lists the inputs, and reads and decodes a few hundred images on this machine. A model's speed is measured where this
    machine has a GPU, or else taken from a published table; what the table lacks is measured on the CPU, and what is
    stated goes before all. Exit code 2 where the run would take more than --budget, or more device-hours than its
    budget_hours.
    """
    settings = runfile.load(path).located()
    architectures.refuse_unlike_samples(settings)
    content = {**(runfile.keys_and_values(rates_file) if rates_file else {}), **given}
    stated = rates.stated(content, str(rates_file) if rates_file else "rates")
    if budget and not stated.gpu_price_per_h:
        raise Refused("--budget: the price of a device is not known; give --gpu-price-per-h")
    refuse_none(settings.unlabeled)
    inputs = inputs_of(settings, classes)
    found = resolved(settings, inputs, stated)
    result = estimate(settings, inputs, {name: rate.value for name, rate in found.items()}, stated)
    print("\n".join([*told_inputs(settings, inputs), "", *table(result, stated), "", *told(result, stated, found)]))
    refuse_above(result, stated, budget, settings.budget_hours)


def resolved(settings: RunFile, inputs: Inputs, stated: Stated) -> dict[str, Rate]:
    """Return every rate: stated, or measured, or published. Measures only what is asked for."""
    values = {name: getattr(stated, name) for name in MEASURED}
    found = {name: Rate(value, "stated") for name, value in values.items() if value is not None}
    if not {"decode_images_per_s", "read_bytes_per_s"} <= found.keys():
        seen = probe(settings)
        found = {"decode_images_per_s": seen.decode, "read_bytes_per_s": seen.read, **found}
    for model in MODELS:
        names = {what: f"{model}_{what}_images_per_s" for what in ("forward", "train")}
        if not set(names.values()) <= found.keys():
            architecture = getattr(settings, f"{model}_architecture")
            known = {} if tasks.gpus() else rates.published(architecture, settings.resolution)
            frames = settings.frames_of(model)
            measured = known or device_rates(architecture, settings.resolution, inputs.classes, frames)
            found = {**{names[what]: rate for what, rate in measured.items()}, **found}
    return found


def refuse_above(result: Estimate, stated: Stated, budget: float, budget_hours: float) -> None:
    """Raise Refused where the estimate is above a budget."""
    cost = result.cost(stated)
    if budget and cost > budget:
        raise Refused(
            f"--budget {budget:g}: the run would cost {cost:,.2f}; lower K, the trainings' lengths or the pool"
        )
    if budget_hours and result.device_hours > budget_hours:
        raise Refused(
            f"budget_hours: {budget_hours:g}, but the run would take {result.device_hours:,.1f} device-hours, and "
            "would stop on the way; set more, or lower K, the trainings' lengths or the pool"
        )


def told_inputs(settings: RunFile, inputs: Inputs) -> list[str]:
    """Say what the run works on."""
    pool, what = inputs.unlabeled, "video" if settings.frames else "image"
    return [
        f"{settings.name}: about {pool.images:,} unlabeled {what}s in {pool.shards:,} shards, "
        f"{short(pool.size_bytes)}B ({short(pool.image_bytes)}B a{'' if settings.frames else 'n'} {what})",
        f"labeled {inputs.labeled.images:,}, validation {inputs.validation.images or 'held out'}, "
        f"test {inputs.test.images:,}; {inputs.classes:,} classes",
    ]


def table(result: Estimate, stated: Stated) -> list[str]:
    """Return the table of stages, with their sum."""
    priced = "cost" if stated.gpu_price_per_h else "cost*"
    titles = ("hours", "device-h", "read", "kept", "GET", "PUT", priced)
    lines = [f"{'stage':10}" + "".join(f"{title:>10}" for title in titles) + "  bound by"]
    lines += [row(stage, stated) for stage in result.stages]
    stages = result.stages
    total = Stage(
        "total",
        result.hours,
        result.device_hours,
        sum(stage.cpu_hours for stage in stages),
        sum(stage.reads for stage in stages),
        sum(stage.writes for stage in stages),
        sum(stage.read_bytes for stage in stages),
        sum(stage.kept_bytes for stage in stages),
    )
    return [*lines, row(total, stated)]


def row(stage: Stage, stated: Stated) -> str:
    """Return one line of the table."""
    cells = (
        f"{stage.hours:,.2f}",
        f"{stage.device_hours:,.2f}",
        f"{short(stage.read_bytes)}B",
        f"{short(stage.kept_bytes)}B",
        short(stage.reads),
        short(stage.writes),
        f"{stage.cost(stated):,.2f}",
    )
    return (f"{stage.name:10}" + "".join(f"{cell:>10}" for cell in cells) + f"  {stage.bound_by}").rstrip()


def told(result: Estimate, stated: Stated, found: dict[str, Rate]) -> list[str]:
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


def short(number: float) -> str:
    """Write a number in a few characters: 1.5G."""
    for scale, letter in SCALE:
        if number >= scale:
            return f"{number / scale:.1f} {letter}"
    return f"{number:.0f} "
