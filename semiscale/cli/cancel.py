"""Cancel: end runs on a cluster. What they finished is kept, and a new run goes on from it."""

from pathlib import Path

from semiscale.cli.kfp_client import Server, connect, display_name_filter, list_all, translate_api_errors
from semiscale.cli.model_source import is_run_file
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config

ACTIVE_STATES = ("PENDING", "RUNNING", "PAUSED")


def cancel(run: str, server: Server) -> None:
    """Terminate a run by its id, or every run of a run file that is under way; a schedule goes on."""
    api = connect(server)
    for run_id in find_active_run_ids(run, server, api):
        with translate_api_errors():
            api.terminate_run(run_id)
        print(f"cancelled: run {run_id}")


def find_active_run_ids(run: str, server: Server, api: object) -> list[str]:
    """Return the ids of the runs to end. Raises InvalidInputError where a run file has none under way."""
    if not is_run_file(run) and not Path(run).is_file():
        return [run]
    name = run_config.load_run_config(Path(run)).name
    owner = {"namespace": server.namespace} if server.namespace else {}
    experiments = list_all(api.list_experiments, "experiments", filter=display_name_filter(name), **owner)  # type: ignore[attr-defined]
    found = [
        str(one.run_id)
        for experiment in experiments
        for one in list_all(api.list_runs, "runs", experiment_id=experiment.experiment_id)  # type: ignore[attr-defined]
        if one.state in ACTIVE_STATES
    ]
    if not found:
        raise InvalidInputError(f"{run}: no run {name!r} is under way")
    return found
