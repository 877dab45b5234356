"""The verb `demo`: run the whole pipeline on handwritten digits."""

import argparse
from pathlib import Path

from semiscale.cli.command import Command, Options
from semiscale.cli.compile import MANIFESTS
from semiscale.cli.demo_images import write_images
from semiscale.cli.run import run

RUN_FILE = MANIFESTS / "runs" / "demo.yaml"
IMAGES = Path("runs/demo-images")


def demo() -> None:
    """Write the images of the demo if they are missing, and run its run file."""
    if not IMAGES.exists():
        write_images(IMAGES, seed=0)
    run(RUN_FILE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no argument: `demo` has none."""


def execute(options: Options) -> None:
    """Run the verb."""
    demo()


COMMAND = Command(
    help="run the demo on handwritten digits",
    description="Write the demo's images, if they are missing, and run manifests/runs/demo.yaml.",
    examples=("",),
    add_arguments=add_arguments,
    execute=execute,
)
