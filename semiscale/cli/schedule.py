"""Schedule: one recurring run on a cluster, for retraining every night."""

import re
from pathlib import Path
from typing import Any

from kfp.dsl.graph_component import GraphComponent

from semiscale.cli.kfp_client import Server, display_name_filter, list_all, translate_api_errors
from semiscale.cli.submit import PreparedRun, prepare_run
from semiscale.common.errors import InvalidInputError

CRON_FIELD = re.compile(r"^[0-9A-Za-z*?/,#-]+$")
# As Kubeflow's own parser has them (https://github.com/robfig/cron): the week ends with day 6.
FIELDS = {"second": (0, 59), "minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}


def schedule(pipeline: GraphComponent, path: Path, cron: str, server: Server, images_on_nodes: bool) -> None:
    """Run a run file on Kubeflow whenever a cron expression says (UTC); called again, it changes that one schedule.

    Runs do not overlap, and what was missed while the cluster was down is not made up for. Each run lists the bucket
    anew and finds finished work. A run of the schedule before it goes on; until its end the new one's are refused.
    """
    expression = to_kfp_cron(cron)
    place = prepare_run(pipeline, path, server, images_on_nodes)
    before = list_all(
        place.client.list_recurring_runs,
        "recurring_runs",
        experiment_id=place.experiment,
        filter=display_name_filter(place.settings.name),
    )
    wanted = schedule_spec(place, expression, server.service_account)
    same = [one for one in before if existing_schedule_spec(one) == wanted]
    kept = same[0] if same else create_schedule(place, expression, server.service_account)
    # The new one is there before the old ones go: an interruption leaves two, which the next call makes one again.
    for old in [one for one in before if one.recurring_run_id != kept.recurring_run_id]:
        with translate_api_errors():
            place.client.delete_recurring_run(old.recurring_run_id)
    what = "unchanged" if same else "changed" if before else "created"
    print(f"schedule {place.settings.name!r} {what}: {cron!r} UTC, recurring run {kept.recurring_run_id}")


def to_kfp_cron(cron: str) -> str:
    """Return a cron expression of Kubeflow, which begins with seconds. Raises InvalidInputError for what is none."""
    fields = cron.split()
    if len(fields) not in (5, 6) or not all(map(CRON_FIELD.match, fields)):
        raise InvalidInputError(
            f"--cron {cron!r}: expected five fields, minute hour day month weekday, for example '0 2 * * *'"
        )
    whole = fields if len(fields) == 6 else ["0", *fields]
    for field, (name, (least, most)) in zip(whole, FIELDS.items(), strict=True):
        numbers = re.findall(r"(?<![/\d])\d+", field)  # not the step after a slash
        if not all(least <= int(number) <= most for number in numbers):
            raise InvalidInputError(f"--cron {cron!r}: {field!r} is no {name}; expected {least} to {most}")
    return " ".join(whole)


def create_schedule(place: PreparedRun, expression: str, service_account: str) -> Any:
    """Create the recurring run."""
    with translate_api_errors():
        return place.client.create_recurring_run(
            place.experiment,
            place.settings.name,
            cron_expression=expression,
            max_concurrency=1,
            no_catchup=True,
            params=place.parameters,
            pipeline_id=place.pipeline,
            version_id=place.version,
            service_account=service_account,
        )


def schedule_spec(place: PreparedRun, expression: str, service_account: str) -> tuple[Any, ...]:
    """Return what tells one schedule from another."""
    return expression, place.version, place.parameters, service_account, "1", True, "ENABLE"


def existing_schedule_spec(recurring: Any) -> tuple[Any, ...]:
    """Return the same of a recurring run on the server."""
    schedule, version = recurring.trigger and recurring.trigger.cron_schedule, recurring.pipeline_version_reference
    return (
        schedule and schedule.cron,
        version and version.pipeline_version_id,
        recurring.runtime_config and recurring.runtime_config.parameters,
        recurring.service_account,
        str(recurring.max_concurrency),
        recurring.no_catchup,
        recurring.mode,
    )
