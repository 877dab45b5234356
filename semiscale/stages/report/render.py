"""The page: the sections of a run, put into one HTML document that asks nothing of the network."""

from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from semiscale.receipts.base import BadSample
from semiscale.stages.report import number_format, view_models
from semiscale.stages.report.charts import FRAME, MIN_LOSS
from semiscale.stages.report.gallery import Gallery
from semiscale.stages.report.run_receipts import RunReceipts


def render(run: RunReceipts, gallery: Gallery, examples: list[BadSample]) -> str:
    """Return the page. Whatever comes from class names, keys or file names is escaped, in one place: the template."""
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            plan=run.plan,
            selection=run.selection,
            ledger=run.selection.ledger,
            models=view_models.model_rows(run),
            gains=view_models.student_gains(run),
            short=view_models.short_classes(run.selection),
            short_listed=view_models.SHORT_LISTED,
            gallery=gallery,
            examples=examples,
            panels=view_models.training_panels(run),
            least_loss=MIN_LOSS,
            sweeps=view_models.sweeps(run),
            stages=view_models.stage_time_bars(run),
            clocks=view_models.part_time_bars(run),
            slowest=view_models.bottleneck_advice(run),
            classes=view_models.class_rows(run),
            model_names=view_models.MODELS,
            confusion=view_models.confusion_rows(run),
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
        number_format.number,
        number_format.count_noun,
        number_format.percent,
        number_format.p_value,
        number_format.percentage_points,
        number_format.compare_in_words,
        number_format.signed,
        number_format.probability,
        number_format.format_learning_rate,
        number_format.duration,
        number_format.size,
    )
    environment.filters.update({write.__name__: write for write in filters})
    environment.globals["frame"] = FRAME
    return environment
