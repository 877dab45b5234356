"""The verb `submit`: start one run on Kubeflow Pipelines."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp import Client, compiler
from kfp.dsl.graph_component import GraphComponent

from components import container_images
from semiscale.cli.command import Command, Options, load_pipeline
from semiscale.cli.compile import replace_images, trace_pipeline, version_name
from semiscale.cli.kfp_client import (
    Server,
    add_connection_arguments,
    add_start_arguments,
    call_with_url,
    connect,
    display_name_filter,
    list_all,
    server_from_options,
)
from semiscale.cli.preflight import check_images_pushed, preflight
from semiscale.common.errors import InvalidInputError
from semiscale.common.text import to_single_line
from semiscale.config.resources import Resources
from semiscale.config.run_config import RunConfig, load_run_config
from semiscale.observability import task_status
from semiscale.stages.plan.concurrent_runs import check_no_concurrent_run

PIPELINE = "semiscale"


@dataclass(frozen=True)
class PreparedRun:
    """A run file whose experiment and pipeline version exist on the server.

    Attributes:
        client: Client of the server.
        settings: The run file.
        experiment: Id of the experiment, which has the name of the run.
        pipeline: Id of the pipeline.
        version: Id of the version of the pipeline.
        parameters: Arguments of the pipeline.
    """

    client: Client
    settings: RunConfig
    experiment: str
    pipeline: str
    version: str
    parameters: dict[str, Any]


def submit(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> None:
    """Start a run of a run file and print its id and its address.

    Args:
        pipeline: The pipeline graph.
        path: The run file.
        server: Kubeflow Pipelines to call.
        images_on_nodes: Every node has the images, so that they need no registry.

    Raises:
        InvalidInputError: The run file is invalid, a run of its name is active, or the server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    check_not_active(path)
    prepared = prepare_run(pipeline, path, server, images_on_nodes)
    try_announce_submission(prepared.settings)
    run, address = call_with_url(
        lambda: prepared.client.run_pipeline(
            prepared.experiment,
            prepared.settings.name,
            params=prepared.parameters,
            pipeline_id=prepared.pipeline,
            version_id=prepared.version,
            service_account=server.service_account,
        )
    )
    print(f"submitted: run {run.run_id}\n{address}")


def prepare_run(pipeline: GraphComponent, path: Path, server: Server, images_on_nodes: bool) -> PreparedRun:
    """Check a run file, and create its experiment and its pipeline version on the server.

    Args:
        pipeline: The pipeline graph.
        path: The run file.
        server: Kubeflow Pipelines to call.
        images_on_nodes: Every node has the images, so that they need no registry.

    Raises:
        InvalidInputError: The run file is invalid, or the server refuses the request.
        SemiscaleError: The server fails or does not answer.
    """
    settings = preflight(path)
    text = compile_for(pipeline, settings.hardware.choose_fan_out(settings.pods))
    if not images_on_nodes:
        check_images_pushed(text)
    client = connect(server)
    experiment, _ = call_with_url(lambda: client.create_experiment(settings.name, namespace=server.namespace or None))
    pipeline_id, version = ensure_pipeline_version(client, text, server.namespace)
    return PreparedRun(client, settings, experiment.experiment_id, pipeline_id, version, settings.pipeline_arguments())


def compile_for(pipeline: GraphComponent, hardware: Resources) -> str:
    """Return the pipeline, compiled for the hardware of a run, with the pushed images.

    Args:
        pipeline: The pipeline graph.
        hardware: Resources that its tasks request.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(trace_pipeline(pipeline, hardware), str(path))
        return replace_images(path.read_text(), container_images.load_pushed_images())


def ensure_pipeline_version(client: Client, text: str, namespace: str) -> tuple[str, str]:
    """Return the ids of the pipeline and of its version, and upload them if they are new.

    The name of a version is the digest of its text, so that the same text is uploaded once.

    Args:
        client: Client of the server.
        text: The compiled pipeline.
        namespace: Namespace of the user. Empty: the server has none.
    """
    name = version_name(text)
    owner = {"namespace": namespace} if namespace else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(text)
        pipelines = list_all(client.list_pipelines, "pipelines", filter=display_name_filter(PIPELINE), **owner)
        if pipelines:
            pipeline_id = str(pipelines[0].pipeline_id)
        else:
            pipeline_id = str(
                call_with_url(lambda: client.upload_pipeline(str(path), PIPELINE, **owner))[0].pipeline_id
            )
        versions = list_all(
            client.list_pipeline_versions,
            "pipeline_versions",
            pipeline_id=pipeline_id,
            filter=display_name_filter(name),
        )
        if versions:
            return pipeline_id, str(versions[0].pipeline_version_id)
        version, address = call_with_url(
            lambda: client.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id)
        )
        print(f"pipeline version {name}: {address}")
        return pipeline_id, str(version.pipeline_version_id)


def check_not_active(path: Path) -> None:
    """Check that no run of this name is active, if this machine can read the workdir.

    The plan on the cluster checks it too, but only after its pod has started.

    Args:
        path: The run file.

    Raises:
        InvalidInputError: The run file is invalid, or a task of a run of its name is active.
    """
    settings = load_run_config(path)
    try:
        check_no_concurrent_run(settings.workdir, settings.name)
    except InvalidInputError:
        raise
    # The client of any vendor can miss credentials here. The pods have their own.
    except Exception as error:  # noqa: BLE001
        print(f"The workdir cannot be read from here: {to_single_line(str(error))[:200]}")


def try_announce_submission(settings: RunConfig) -> None:
    """Record the submission in the workdir, if this machine can write there."""
    try:
        task_status.announce_submission(settings.workdir, settings.name)
    # The client of any vendor can miss credentials here. The pods have their own.
    except Exception as error:  # noqa: BLE001
        print(
            "The workdir cannot be written from here, so that `watch` does not show the submission: "
            f"{to_single_line(str(error))[:200]}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `submit`."""
    parser.add_argument("run_file", type=Path)
    add_start_arguments(parser)
    add_connection_arguments(parser)


def execute(options: Options) -> None:
    """Run the verb."""
    submit(load_pipeline(options), options.run_file, server_from_options(options), options.images_on_nodes)
    print(f"follow it: {options.program} watch {options.run_file}")


COMMAND = Command(
    help="run it on Kubeflow",
    description="Run a run file on Kubeflow: upload the pipeline if this version is new, create the run, print its\n"
    "address.\n\n"
    "The run file is checked first. Finished work is reused, as on one machine.",
    examples=("my-run.yaml", "my-run.yaml --host https://kubeflow.example/pipeline"),
    add_arguments=add_arguments,
    execute=execute,
)
