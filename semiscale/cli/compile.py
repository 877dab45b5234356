"""The verb `compile`: write the pipeline as the YAML that Kubeflow and kfp.local execute."""

import argparse
import hashlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kfp import compiler, dsl
from kfp.compiler.compiler_utils import KubernetesManifestOptions
from kfp.dsl.graph_component import GraphComponent

from components import container_images
from components.placement import use_resources
from semiscale.cli.command import Command, Options, load_pipeline
from semiscale.common.errors import InvalidInputError
from semiscale.config import run_config
from semiscale.config.form import SETTINGS
from semiscale.config.resources import Resources
from semiscale.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (ROOT / "manifests").is_dir()
# An installed package has the manifests that its verbs read among its data files.
MANIFESTS = ROOT / "manifests" if IS_CHECKOUT else Path(sys.prefix) / "share" / "semiscale" / "manifests"
DEFAULT_PIPELINE_YAML = MANIFESTS / "pipeline.yaml"
SETTINGS_COMMENT = re.compile(rf"^(#    {SETTINGS}: dict \[Default: ).*\]$", re.MULTILINE)
# The run files whose compiled form is committed under manifests/compiled.
COMPILED_RUNS = ("demo", "paper")


def compile_pipeline(pipeline: GraphComponent, run_file: Path | None, output: Path | None, kubernetes: bool) -> None:
    """Compile the pipeline for a run file, with its hardware and its values as defaults of the form.

    Args:
        pipeline: The pipeline graph.
        run_file: The run file. None: write every compiled file under manifests/ anew.
        output: File to write. None: `<name of the run>.pipeline.yaml`.
        kubernetes: Write Pipeline and PipelineVersion objects instead of a pipeline package.

    Raises:
        InvalidInputError: The run file is invalid, or the name of the output does not end in .yaml.
    """
    if run_file is None:
        compile_manifests(pipeline)
        return
    settings = run_config.load_run_config(run_file)
    output = output or Path(f"{settings.name}.pipeline.yaml")
    if output.suffix != ".yaml":
        raise InvalidInputError(
            "SEMI-E403", f"--output {output}: The name does not end in .yaml. Choose a name that ends in .yaml."
        )
    write_pipeline_yaml(pipeline, output, settings)
    text = replace_images(output.read_text(), container_images.load_pushed_images())
    if kubernetes:
        # A PipelineVersion object cannot be changed. Its name holds the digest of the text, so that each text
        # becomes a version of its own.
        write_pipeline_yaml(pipeline, output, settings, f"{kubernetes_name(settings.name)}-{version_name(text)}")
        text = replace_images(output.read_text(), container_images.load_pushed_images())
    output.write_text(text)
    print(f"compiled: {output}")


def compile_manifests(pipeline: GraphComponent) -> None:
    """Write every compiled file under manifests/ anew.

    Raises:
        InvalidInputError: The program runs outside a checkout of the repository.
    """
    require_checkout("compile")
    write_pipeline_yaml(pipeline, DEFAULT_PIPELINE_YAML)
    for name in COMPILED_RUNS:
        settings = run_config.load_run_config(MANIFESTS / "runs" / f"{name}.yaml")
        write_pipeline_yaml(pipeline, MANIFESTS / "compiled" / f"{name}.yaml", settings)


def require_checkout(verb: str) -> None:
    """Check that the program runs in a checkout of the repository.

    Raises:
        InvalidInputError: The program is an installed package.
    """
    if not IS_CHECKOUT:
        raise InvalidInputError(
            "SEMI-E404",
            f"{verb}: The installed package lacks the files of the repository. Clone the repository and run "
            f"`python pipeline.py {verb}` there.",
        )


def version_name(text: str) -> str:
    """Return the version of a compiled pipeline: a digest of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_pipeline_yaml(
    pipeline: GraphComponent, path: Path, settings: RunConfig | None = None, version: str = ""
) -> None:
    """Write the compiled pipeline.

    The same graph and run file give the same bytes. The number of pods decides only how they fan out.

    Args:
        pipeline: The pipeline graph.
        path: File to write.
        settings: Run file that gives the hardware and the defaults. None: default hardware, no values.
        version: Version of the Kubernetes objects to write. Empty: write a pipeline package.
    """
    graph = trace_pipeline(pipeline, settings.hardware.choose_fan_out(settings.pods) if settings else Resources())
    compiler.Compiler().compile(
        graph,
        str(path),
        pipeline_parameters=settings.pipeline_arguments() if settings else None,
        kubernetes_manifest_format=bool(version),
        kubernetes_manifest_options=KubernetesManifestOptions(
            pipeline_version_name=f"{graph.name}-{version}", include_pipeline_manifest=True
        ),
    )
    if settings:
        # kfp writes the dict into a comment, in the order of a protobuf map, which differs between processes.
        chosen = dict(sorted(settings.pipeline_arguments()[SETTINGS].items()))
        path.write_text(SETTINGS_COMMENT.sub(lambda line: f"{line[1]}{chosen}]", path.read_text(), count=1))


def trace_pipeline(pipeline: GraphComponent, hardware: Resources) -> GraphComponent:
    """Return the pipeline, traced for this hardware.

    Args:
        pipeline: The pipeline graph.
        hardware: Resources that its tasks request.
    """
    # For each setting of a task kfp 2.17 inspects the whole stack. For a frame without a module it inspects every
    # loaded module, which takes seconds in a notebook or in pytest. The stack of a new thread is short.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_trace_with_resources, pipeline, hardware).result()


def _trace_with_resources(pipeline: GraphComponent, hardware: Resources) -> GraphComponent:
    with use_resources(hardware):
        return dsl.pipeline(name=pipeline.name, description=pipeline.description)(pipeline.pipeline_func)


def kubernetes_name(name: str) -> str:
    """Turn the name of a run into a name that Kubernetes accepts."""
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def replace_images(text: str, pushed: dict[str, str]) -> str:
    """Replace image tags by the digests in the registry, because a tag can move.

    Args:
        text: A compiled pipeline.
        pushed: Name in the registry, digest included, of each image.
    """
    for image, name in pushed.items():
        text = text.replace(image, name)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compile`."""
    parser.add_argument("run_file", type=Path, nargs="?", help="its hardware and values; none: all of manifests/")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.pipeline.yaml")
    parser.add_argument("--kubernetes", action="store_true", help="as Pipeline and PipelineVersion objects")


def execute(options: Options) -> None:
    """Run the verb."""
    compile_pipeline(load_pipeline(options), options.run_file, options.output, options.kubernetes)


COMMAND = Command(
    help="compile the pipeline to YAML for Kubeflow",
    description="Compile the pipeline for a run file: for its hardware, with its values in the form of the UI.\n\n"
    "Without a run file, all compiled files under manifests/ are written anew. Pushed images (`make images PUSH=…`)\n"
    "are named by their digests. With --kubernetes the output is Pipeline and PipelineVersion objects, for clusters\n"
    "that keep pipelines in Kubernetes.",
    examples=("my-run.yaml", "my-run.yaml --kubernetes -o objects.yaml", ""),
    add_arguments=add_arguments,
    execute=execute,
)
