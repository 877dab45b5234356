"""The verb `schedule`: keep one recurring run on Kubeflow Pipelines, such as nightly retraining."""

import argparse
import re
from pathlib import Path
from typing import Any

from kfp import Client
from kfp.dsl.graph_component import GraphComponent

from semiscale.cli.command import Command, Options, load_pipeline
from semiscale.cli.kfp_client import (
    Server,
    add_connection_arguments,
    add_start_arguments,
    connect,
    display_name_filter,
    find_experiments,
    list_all,
    server_from_options,
    translate_api_errors,
)
from semiscale.cli.submit import PreparedRun, prepare_run
from semiscale.common.errors import InvalidInputError
from semiscale.config.run_config import load_run_config

CRON_FIELD = re.compile(r"^[0-9A-Za-z*?/,#-]+$")
# Name, smallest and largest number of each field of a cron expression. Kubeflow's parser ends the week with day 6:
# https://github.com/robfig/cron
FIELDS = {"second": (0, 59), "minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}


def delete_schedule(path: Path, server: Server) -> None:
    """Delete the schedule of a run file. Its runs go on.

    Args:
        path: The run file.
        server: Kubeflow Pipelines to call.

    Raises:
        InvalidInputError: The run file has no schedule, or the server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    name = load_run_config(path).name
    client = connect(server)
    existing = [
        recurring
        for experiment in find_experiments(client, name, server.namespace)
        for recurring in find_schedules(client, experiment.experiment_id, name)
    ]
    if not existing:
        raise InvalidInputError(
            "SEMI-E441", f"{path}: Run {name!r} has no schedule on this server. Check --host and --namespace."
        )
    for recurring in existing:
        with translate_api_errors():
            client.delete_recurring_run(recurring.recurring_run_id)
    print(f"schedule {name!r} deleted")


def find_schedules(client: Client, experiment: str, name: str) -> list[Any]:
    """Return the recurring runs of a run file. There is more than one after an interruption.

    Args:
        client: Client of the server.
        experiment: Id of the experiment.
        name: Name of the run.
    """
    return list_all(
        client.list_recurring_runs,
        "recurring_runs",
        experiment_id=experiment,
        filter=display_name_filter(name),
    )


def schedule(pipeline: GraphComponent, path: Path, cron: str, server: Server, images_on_nodes: bool) -> None:
    """Create the schedule of a run file, or change the one that exists.

    Args:
        pipeline: The pipeline graph.
        path: The run file.
        cron: Five fields (minute, hour, day, month, weekday) in UTC, or six that begin with seconds.
        server: Kubeflow Pipelines to call.
        images_on_nodes: Every node has the images, so that they need no registry.

    Raises:
        InvalidInputError: The run file or the cron expression is invalid, or the server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    expression = to_kfp_cron(cron)
    prepared = prepare_run(pipeline, path, server, images_on_nodes)
    existing = find_schedules(prepared.client, prepared.experiment, prepared.settings.name)
    wanted = schedule_spec(prepared, expression, server.service_account)
    equal = [recurring for recurring in existing if existing_schedule_spec(recurring) == wanted]
    current = equal[0] if equal else create_schedule(prepared, expression, server.service_account)
    # The new schedule exists before the old ones are deleted. An interruption leaves two, and the next call deletes
    # one of them.
    for old in [recurring for recurring in existing if recurring.recurring_run_id != current.recurring_run_id]:
        with translate_api_errors():
            prepared.client.delete_recurring_run(old.recurring_run_id)
    outcome = "unchanged" if equal else "changed" if existing else "created"
    print(f"schedule {prepared.settings.name!r} {outcome}: {cron!r} UTC, recurring run {current.recurring_run_id}")


def to_kfp_cron(cron: str) -> str:
    """Return the cron expression in the form of Kubeflow, which begins with seconds.

    Raises:
        InvalidInputError: The text is not a cron expression, or a number is out of range.
    """
    fields = cron.split()
    if len(fields) not in (5, 6) or not all(map(CRON_FIELD.match, fields)):
        raise InvalidInputError(
            "SEMI-E423",
            f"--cron {cron!r}: This is not a cron expression. Give five fields, minute hour day month weekday, for "
            "example '0 2 * * *'.",
        )
    all_fields = fields if len(fields) == 6 else ["0", *fields]
    for field, (name, (lowest, highest)) in zip(all_fields, FIELDS.items(), strict=True):
        # The step after a slash is no moment and may be larger.
        numbers = re.findall(r"(?<![/\d])\d+", field)
        if not all(lowest <= int(number) <= highest for number in numbers):
            raise InvalidInputError(
                "SEMI-E424", f"--cron {cron!r}: {field!r} is no {name}. Use numbers from {lowest} to {highest}."
            )
    return " ".join(all_fields)


def create_schedule(prepared: PreparedRun, expression: str, service_account: str) -> Any:
    """Create the recurring run.

    Args:
        prepared: The run file and its version of the pipeline on the server.
        expression: Cron expression in the form of Kubeflow.
        service_account: Service account of the pods.
    """
    with translate_api_errors():
        return prepared.client.create_recurring_run(
            prepared.experiment,
            prepared.settings.name,
            cron_expression=expression,
            max_concurrency=1,
            no_catchup=True,
            params=prepared.parameters,
            pipeline_id=prepared.pipeline,
            version_id=prepared.version,
            service_account=service_account,
        )


def schedule_spec(prepared: PreparedRun, expression: str, service_account: str) -> tuple[Any, ...]:
    """Return the values by which two schedules are compared.

    Args:
        prepared: The run file and its version of the pipeline on the server.
        expression: Cron expression in the form of Kubeflow.
        service_account: Service account of the pods.
    """
    return expression, prepared.version, prepared.parameters, service_account, "1", True, "ENABLE"


def existing_schedule_spec(recurring: Any) -> tuple[Any, ...]:
    """Return the values of `schedule_spec` for a recurring run on the server."""
    cron_schedule, version = recurring.trigger and recurring.trigger.cron_schedule, recurring.pipeline_version_reference
    return (
        cron_schedule and cron_schedule.cron,
        version and version.pipeline_version_id,
        recurring.runtime_config and recurring.runtime_config.parameters,
        recurring.service_account,
        str(recurring.max_concurrency),
        recurring.no_catchup,
        recurring.mode,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `schedule`."""
    parser.add_argument("run_file", type=Path)
    change = parser.add_mutually_exclusive_group(required=True)
    change.add_argument("--cron", help="minute hour day month weekday, UTC")
    change.add_argument("--delete", action="store_true", help="end the schedule; its runs go on")
    add_start_arguments(parser)
    add_connection_arguments(parser)


def execute(options: Options) -> None:
    """Run the verb."""
    server = server_from_options(options)
    if options.delete:
        delete_schedule(options.run_file, server)
        return
    schedule(load_pipeline(options), options.run_file, options.cron, server, options.images_on_nodes)


COMMAND = Command(
    help="run it on Kubeflow at the times of a cron expression",
    description="Run a run file on Kubeflow at the times of a cron expression (UTC). A second call changes the\n"
    "schedule.\n\n"
    "Runs do not overlap, and runs that were missed while the cluster was down are not made up for. Each run lists\n"
    "the bucket anew and reuses finished work. An active run of the replaced schedule continues. Until it ends, runs\n"
    "of the new schedule are refused. `cancel` ends it.",
    examples=("my-run.yaml --cron '0 2 * * *'", "my-run.yaml --delete"),
    add_arguments=add_arguments,
    execute=execute,
)
