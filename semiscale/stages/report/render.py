"""Render the report as one HTML document that needs no network."""

from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from semiscale.common.text import count_noun
from semiscale.receipts.base import BadSample
from semiscale.receipts.evaluate import has_top5
from semiscale.receipts.validation_warnings import validation_warnings
from semiscale.stages.report import number_format, view_models
from semiscale.stages.report.charts import FRAME, MIN_LOSS
from semiscale.stages.report.gallery import Gallery
from semiscale.stages.report.page_header import PageHeader
from semiscale.stages.report.run_receipts import RunReceipts


def render(run: RunReceipts, header: PageHeader, gallery: Gallery, examples: list[BadSample]) -> str:
    """Return the page. The template escapes class names, keys and file names.

    Args:
        run: The receipts of the run.
        header: Date, version, device and elapsed time.
        gallery: Images of some classes by rank.
        examples: Images that could not be scored.

    Returns:
        The HTML text.
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            header=header,
            warnings=validation_warnings(run.plan, run.teacher),
            plan=run.plan,
            selection=run.selection,
            ledger=run.selection.ledger,
            models=view_models.model_rows(run),
            gains=view_models.student_gains(run),
            short_classes=view_models.short_classes(run.selection),
            max_short_classes_listed=view_models.MAX_SHORT_CLASSES_LISTED,
            gallery=gallery,
            examples=examples,
            panels=view_models.training_panels(run),
            min_loss=MIN_LOSS,
            sweeps=view_models.sweeps(run),
            stage_times=view_models.stage_time_bars(run),
            part_times=view_models.part_time_bars(run),
            bottleneck=view_models.bottleneck_advice(run),
            classes=view_models.class_rows(run),
            has_top5=has_top5(len(run.plan.classes)),
            model_names=view_models.MODELS,
            confusion=view_models.confusion_rows(run),
            promotion=run.promotion,
            parameters=yaml.safe_dump(run.plan.run, sort_keys=False, allow_unicode=True),
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
        count_noun,
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
