"""Submit: one run on a cluster, from the shell."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import Client, compiler
from kfp.dsl.graph_component import GraphComponent

from components import images
from components.shared import tasks
from components.shared.hardware import Hardware
from components.shared.runfile import RunFile
from components.shared.wording import one_line
from components.verbs.check import checked, refuse_unpushed
from components.verbs.compile import traced, version_of, with_pushed_images
from components.verbs.kubeflow import Server, addressed, all_pages, client, named

PIPELINE = "semiscale"


@dataclass(frozen=True)
class Placed:
    """A run file on a server: its experiment, which is called as the run is, and its version of the pipeline."""

    client: Client
    settings: RunFile
    experiment: str
    pipeline: str
    version: str
    parameters: dict[str, Any]


def submit(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> None:
    """Run a run file on Kubeflow: upload the pipeline if this version is new, create the run, print its address.

    The run file is checked first. Finished work is found, as on one machine.
    """
    place = placed(pipeline, path, server, images_on_nodes)
    say_first(place.settings)
    run, address = addressed(
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


def placed(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> Placed:
    """Check a run file and bring what it needs to the server: experiment, pipeline, version."""
    settings = checked(path)
    text = compiled(pipeline, settings.hardware)
    if not images_on_nodes:
        refuse_unpushed(text)
    api = client(server)
    experiment, _ = addressed(lambda: api.create_experiment(settings.name, namespace=server.namespace or None))
    pipeline_id, version = uploaded(api, text, server.namespace)
    return Placed(api, settings, experiment.experiment_id, pipeline_id, version, settings.parameters())


def compiled(pipeline: GraphComponent, hardware: Hardware) -> str:
    """Return the pipeline, compiled for the run's hardware, with the images that were pushed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(traced(pipeline, hardware), str(path))
        return with_pushed_images(path.read_text(), images.pushed())


def uploaded(api: Client, text: str, namespace: str) -> tuple[str, str]:
    """Return the ids of the pipeline and of its version, called by the digest of its text; uploads what is new."""
    name = version_of(text)
    owner = {"namespace": namespace} if namespace else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(text)
        known = all_pages(api.list_pipelines, "pipelines", filter=named(PIPELINE), **owner)
        if known:
            pipeline_id = str(known[0].pipeline_id)
        else:
            pipeline_id = str(addressed(lambda: api.upload_pipeline(str(path), PIPELINE, **owner))[0].pipeline_id)
        found = all_pages(api.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id, filter=named(name))
        if found:
            return pipeline_id, str(found[0].pipeline_version_id)
        version, address = addressed(lambda: api.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id))
        print(f"pipeline version {name}: {address}")
        return pipeline_id, str(version.pipeline_version_id)


def say_first(settings: RunFile) -> None:
    """Leave word in the workdir that a new try begins, where this machine may write there."""
    try:
        tasks.announce(settings.workdir, settings.name)
    except Exception as error:  # noqa: BLE001 - no credentials here, of any vendor: the pods have their own
        print(f"the workdir cannot be written from here, which only `watch` would miss: {one_line(str(error))[:200]}")
