"""Cancel: end runs on a cluster. What they finished is kept, and a new run goes on from it."""

from pathlib import Path

from components.shared import runfile
from components.shared.errors import Refused
from components.verbs.kubeflow import Server, all_pages, answering, client, named
from components.verbs.trained import is_run_file

ACTIVE = ("PENDING", "RUNNING", "PAUSED")


def cancel(run: str, server: Server) -> None:
    """Terminate a run by its id, or every run of a run file that is under way; a schedule goes on."""
    api = client(server)
    for run_id in ids_of(run, server, api):
        with answering():
            api.terminate_run(run_id)
        print(f"cancelled: run {run_id}")


def ids_of(run: str, server: Server, api: object) -> list[str]:
    """Return the ids of the runs to end. Raises Refused where a run file has none under way."""
    if not is_run_file(run) and not Path(run).is_file():
        return [run]
    name = runfile.load(Path(run)).name
    owner = {"namespace": server.namespace} if server.namespace else {}
    experiments = all_pages(api.list_experiments, "experiments", filter=named(name), **owner)  # type: ignore[attr-defined]
    found = [
        str(one.run_id)
        for experiment in experiments
        for one in all_pages(api.list_runs, "runs", experiment_id=experiment.experiment_id)  # type: ignore[attr-defined]
        if one.state in ACTIVE
    ]
    if not found:
        raise Refused(f"{run}: no run {name!r} is under way")
    return found
