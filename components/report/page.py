"""The page: the sections of a run, put into one HTML document that asks nothing of the network."""

from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from components.report import formats, sections
from components.report.charts import FRAME, LEAST_LOSS
from components.report.gallery import Gallery
from components.report.run import Run
from components.shared.receipts import Failure


def render(run: Run, gallery: Gallery, examples: list[Failure]) -> str:
    """Return the page. Whatever comes from class names, keys or file names is escaped, in one place: the template."""
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            plan=run.plan,
            selection=run.selection,
            ledger=run.selection.ledger,
            models=sections.model_rows(run),
            gains=sections.gains(run),
            short=sections.short_classes(run.selection),
            short_listed=sections.SHORT_LISTED,
            gallery=gallery,
            examples=examples,
            panels=sections.panels(run),
            least_loss=LEAST_LOSS,
            sweeps=sections.sweeps(run),
            stages=sections.stage_bars(run),
            clocks=sections.clock_bars(run),
            slowest=sections.slowest(run),
            classes=sections.class_rows(run),
            model_names=sections.MODELS,
            confusion=sections.confusion_rows(run),
            promotion=run.promotion,
            run_file=yaml.safe_dump(run.plan.run, sort_keys=False, allow_unicode=True),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        formats.number,
        formats.counted,
        formats.percent,
        formats.chance,
        formats.points,
        formats.compared,
        formats.signed,
        formats.probability,
        formats.rate,
        formats.duration,
        formats.size,
    )
    environment.filters.update({write.__name__: write for write in filters})
    environment.globals["frame"] = FRAME
    return environment
