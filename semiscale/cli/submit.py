"""Submit: one run on a cluster, from the shell."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import Client, compiler
from kfp.dsl.graph_component import GraphComponent

from components import container_images
from semiscale.cli.compile import replace_images, trace_pipeline, version_name
from semiscale.cli.kfp_client import Server, call_with_url, connect, display_name_filter, list_all
from semiscale.cli.preflight import check_images_pushed, preflight
from semiscale.common.text import to_single_line
from semiscale.config.resources import Resources
from semiscale.config.run_config import RunConfig
from semiscale.observability import task_status

PIPELINE = "semiscale"


@dataclass(frozen=True)
class PreparedRun:
    """A run file on a server: its experiment, which is called as the run is, and its version of the pipeline."""

    client: Client
    settings: RunConfig
    experiment: str
    pipeline: str
    version: str
    parameters: dict[str, Any]


def submit(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> None:
    """Run a run file on Kubeflow: upload the pipeline if this version is new, create the run, print its address.

    The run file is checked first. Finished work is found, as on one machine.
    """
    place = prepare_run(pipeline, path, server, images_on_nodes)
    try_announce_submission(place.settings)
    run, address = call_with_url(
        lambda: place.client.run_pipeline(
            place.experiment,
            place.settings.name,
            params=place.parameters,
            pipeline_id=place.pipeline,
            version_id=place.version,
            service_account=server.service_account,
        )
    )
    print(f"submitted: run {run.run_id}\n{address}")
    print(f"follow it: python pipeline.py watch {path}")


def prepare_run(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> PreparedRun:
    """Check a run file and bring what it needs to the server: experiment, pipeline, version."""
    settings = preflight(path)
    text = compile_for(pipeline, settings.hardware)
    if not images_on_nodes:
        check_images_pushed(text)
    api = connect(server)
    experiment, _ = call_with_url(lambda: api.create_experiment(settings.name, namespace=server.namespace or None))
    pipeline_id, version = ensure_pipeline_version(api, text, server.namespace)
    return PreparedRun(api, settings, experiment.experiment_id, pipeline_id, version, settings.form())


def compile_for(pipeline: GraphComponent, hardware: Resources) -> str:
    """Return the pipeline, compiled for the run's hardware, with the images that were pushed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(trace_pipeline(pipeline, hardware), str(path))
        return replace_images(path.read_text(), container_images.load_pushed_images())


def ensure_pipeline_version(api: Client, text: str, namespace: str) -> tuple[str, str]:
    """Return the ids of the pipeline and of its version, called by the digest of its text; uploads what is new."""
    name = version_name(text)
    owner = {"namespace": namespace} if namespace else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(text)
        known = list_all(api.list_pipelines, "pipelines", filter=display_name_filter(PIPELINE), **owner)
        if known:
            pipeline_id = str(known[0].pipeline_id)
        else:
            pipeline_id = str(call_with_url(lambda: api.upload_pipeline(str(path), PIPELINE, **owner))[0].pipeline_id)
        found = list_all(
            api.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id, filter=display_name_filter(name)
        )
        if found:
            return pipeline_id, str(found[0].pipeline_version_id)
        version, address = call_with_url(lambda: api.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id))
        print(f"pipeline version {name}: {address}")
        return pipeline_id, str(version.pipeline_version_id)


def try_announce_submission(settings: RunConfig) -> None:
    """Leave word in the workdir that a new try begins, where this machine may write there."""
    try:
        task_status.announce_submission(settings.workdir, settings.name)
    except Exception as error:  # noqa: BLE001 - no credentials here, of any vendor: the pods have their own
        print(
            "the workdir cannot be written from here, which only `watch` would miss: "
            f"{to_single_line(str(error))[:200]}"
        )
