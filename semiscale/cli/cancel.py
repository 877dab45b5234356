"""The verb `cancel`: terminate runs on Kubeflow Pipelines."""

import argparse
from pathlib import Path
from typing import Any

from kfp import Client

from semiscale.cli.command import Command, Options
from semiscale.cli.kfp_client import (
    ACTIVE_STATES,
    Server,
    add_connection_arguments,
    connect,
    find_runs,
    server_from_options,
    translate_api_errors,
)
from semiscale.cli.model_source import is_run_file
from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line
from semiscale.config import run_config
from semiscale.observability import task_status
from semiscale.runtime.follower import FOLLOWER_TIMEOUT_S


def cancel(run: str, server: Server) -> None:
    """Terminate one run, or every active run of a run file.

    Args:
        run: Id of a run, or path of a run file.
        server: Kubeflow Pipelines to call.

    Raises:
        InvalidInputError: The run has ended, the run file has no active run, or the server refuses the request.
    """
    client = connect(server)
    for active in find_active_runs(run, server, client):
        with translate_api_errors():
            client.terminate_run(active.run_id)
        print(f"cancelled: run {active.run_id}")
        try_announce_cancellation(getattr(active.runtime_config, "parameters", None) or {})


def try_announce_cancellation(parameters: dict[str, Any]) -> None:
    """Record the cancellation in the workdir of a run, if this machine can write there.

    The pods of a TrainJob or a Job read it, because Kubeflow does not end them with the run.

    Args:
        parameters: Arguments of the pipeline. A run of another pipeline has no workdir.
    """
    if not {"workdir", "name"} <= parameters.keys():
        return
    try:
        task_status.announce_cancellation(parameters["workdir"], parameters["name"])
    # The client of any vendor can miss credentials here.
    except Exception as error:  # noqa: BLE001
        print(
            "The workdir cannot be written from here. Pods of a TrainJob or a Job stop when no task has followed them "
            f"for {FOLLOWER_TIMEOUT_S / 60:.0f} minutes: {to_single_line(str(error))[:200]}"
        )


def find_active_runs(run: str, server: Server, client: Client) -> list[Any]:
    """Return the runs to terminate.

    Args:
        run: Id of a run, or path of a run file.
        server: Kubeflow Pipelines to call. Its namespace limits the search.
        client: Client of that server.

    Raises:
        InvalidInputError: The run has ended, or the run file has no active run.
    """
    if not is_run_file(run) and not Path(run).is_file():
        with translate_api_errors():
            single = client.get_run(run)
        if single.state not in ACTIVE_STATES:
            raise InvalidInputError(
                "SEMI-E440", f"run {run}: The run is not active: {single.state}. Nothing is left to cancel."
            )
        return [single]
    name = run_config.load_run_config(Path(run)).name
    active = [candidate for candidate in find_runs(client, name, server.namespace) if candidate.state in ACTIVE_STATES]
    if not active:
        raise InvalidInputError(
            "SEMI-E425", f"{run}: Run {name!r} has no active run on this server. Check --host and --namespace."
        )
    return active


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cancel`."""
    parser.add_argument("run", metavar="RUN", help="a run file, or the id of a run")
    add_connection_arguments(parser)


def execute(options: Options) -> None:
    """Run the verb."""
    cancel(options.run, server_from_options(options))


COMMAND = Command(
    help="end runs on Kubeflow",
    description="Terminate a run by its id, or every active run of a run file.\n\n"
    "Finished work is kept, and a new run reuses it. A schedule of the run file stays active.",
    examples=("my-run.yaml", "5d6f1c3e-8a1b-4a53-9d57-0e6b7f5f3c1a"),
    add_arguments=add_arguments,
    execute=execute,
)
