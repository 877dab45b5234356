"""Compile the graph to the YAML that Kubeflow and the local runner both execute."""

from pathlib import Path

from kfp import compiler
from kfp.dsl.base_component import BaseComponent

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ROOT / "manifests" / "pipeline.yaml"


def compile_pipeline(pipeline: BaseComponent, path: Path = COMPILED) -> None:
    """Write the compiled pipeline to manifests/pipeline.yaml; the same graph gives the same bytes."""
    compiler.Compiler().compile(pipeline, str(path))
