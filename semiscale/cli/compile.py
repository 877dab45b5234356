"""Compile the graph to the YAML that Kubeflow and the local runner both execute."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kfp import compiler, dsl
from kfp.compiler.compiler_utils import KubernetesManifestOptions
from kfp.dsl.graph_component import GraphComponent

from components import container_images
from components.placement import use_resources
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.form import SETTINGS
from semiscale.config.resources import Resources
from semiscale.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
DEFAULT_PIPELINE_YAML = MANIFESTS / "pipeline.yaml"
SETTINGS_COMMENT = re.compile(rf"^(#    {SETTINGS}: dict \[Default: ).*\]$", re.MULTILINE)
COMPILED_RUNS = ("demo", "paper")  # the run files that are kept compiled


def compile_pipeline(pipeline: GraphComponent, run_file: Path | None, output: Path | None, kubernetes: bool) -> None:
    """Compile the pipeline for a run file: on its hardware, with its values in the UI's form.

    Without a run file, all compiled files under manifests/ are written anew. Pushed images (`make images PUSH=…`) are
    named by their digests. With --kubernetes: as Pipeline and PipelineVersion objects, for clusters that keep pipelines
    in Kubernetes.
    """
    if run_file is None:
        write_pipeline_yaml(pipeline, DEFAULT_PIPELINE_YAML)
        for name in COMPILED_RUNS:
            write_pipeline_yaml(
                pipeline,
                MANIFESTS / "compiled" / f"{name}.yaml",
                run_config.load_run_config(MANIFESTS / "runs" / f"{name}.yaml"),
            )
        return
    settings = run_config.load_run_config(run_file)
    output = output or Path(f"{settings.name}.pipeline.yaml")
    if output.suffix != ".yaml":
        raise InvalidInputError(f"--output {output}: expected a name that ends in .yaml")
    write_pipeline_yaml(pipeline, output, settings)
    text = replace_images(output.read_text(), container_images.load_pushed_images())
    if kubernetes:  # a version never changes there: what differs has another name
        write_pipeline_yaml(pipeline, output, settings, f"{kubernetes_name(settings.name)}-{version_name(text)}")
        text = replace_images(output.read_text(), container_images.load_pushed_images())
    output.write_text(text)
    print(f"compiled: {output}")


def version_name(text: str) -> str:
    """Return the name of a compiled pipeline's version: the digest of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_pipeline_yaml(
    pipeline: GraphComponent, path: Path, settings: RunConfig | None = None, version: str = ""
) -> None:
    """Write the compiled pipeline; the same graph and run file give the same bytes, however many pods it asks for.

    With a version, as Kubernetes objects.
    """
    graph = trace_pipeline(pipeline, settings.hardware if settings else Resources())
    compiler.Compiler().compile(
        graph,
        str(path),
        pipeline_parameters=settings.form() if settings else None,
        kubernetes_manifest_format=bool(version),
        kubernetes_manifest_options=KubernetesManifestOptions(
            pipeline_version_name=f"{graph.name}-{version}", include_pipeline_manifest=True
        ),
    )
    if settings:
        # kfp writes the dict into a comment, in the order of a protobuf map, which differs between processes.
        chosen = dict(sorted(settings.form()[SETTINGS].items()))
        path.write_text(SETTINGS_COMMENT.sub(lambda line: f"{line[1]}{chosen}]", path.read_text(), count=1))


def trace_pipeline(pipeline: GraphComponent, hardware: Resources) -> GraphComponent:
    """Return the pipeline, traced for this hardware.

    kfp 2.17 looks at the whole stack at every setting of a task, and for a frame of no module at every module that is
    loaded: seconds under a notebook or pytest. So it traces in a thread of its own, whose stack is short.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_traced, pipeline, hardware).result()


def _traced(pipeline: GraphComponent, hardware: Resources) -> GraphComponent:
    with use_resources(hardware):
        return dsl.pipeline(name=pipeline.name, description=pipeline.description)(pipeline.pipeline_func)


def kubernetes_name(name: str) -> str:
    """Return a run's name as Kubernetes names objects."""
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def replace_images(text: str, pushed: dict[str, str]) -> str:
    """Name each image as it lies in the registry; a tag may move, a digest is what was built."""
    for image, name in pushed.items():
        text = text.replace(image, name)
    return text
