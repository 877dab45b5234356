"""The command line of `pipeline.py`: verbs, their help, their exit codes."""

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from kfp.dsl.graph_component import GraphComponent

from components.shared.progress import LOG, fail
from components.shared.stage import guarded
from components.verbs.build import build_images
from components.verbs.compile import compile_pipeline
from components.verbs.demo import demo, write_images
from components.verbs.reselect import reselect
from components.verbs.run import run

EPILOG = """exit codes:
  0  all of it was done
  1  the run failed on the way; what was finished is kept, run it again
  2  bad input, refused with one line; before any training, but for a pool that turns out to be unreadable
130  interrupted; run it again to go on
"""


def main(pipeline: GraphComponent, arguments: Sequence[str]) -> int:
    """Run a verb; returns its exit code. Errors are one line on standard error."""
    os.environ.setdefault(LOG, "plain")  # what a verb and its tasks print is for people, unless asked otherwise
    options = parser(pipeline).parse_args(arguments)
    verb: Callable[[argparse.Namespace], None] = options.verb
    try:
        return guarded(lambda: verb(options))
    except KeyboardInterrupt:
        fail("interrupted: what was finished is kept, run it again to go on")
        return 128 + signal.SIGINT


def parser(pipeline: GraphComponent) -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="pipeline.py",
        description="A small labeled set and a huge unlabeled pool: a better classifier at the same inference cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")

    running = verbs.add_parser("run", help="run the whole pipeline on this machine", description=run.__doc__)
    running.add_argument("run_file", type=Path, help="for example manifests/runs/demo.yaml")
    running.set_defaults(verb=lambda options: run(options.run_file))

    selecting = verbs.add_parser(
        "reselect", help="select again from a run's scores, without scoring", description=reselect.__doc__
    )
    selecting.add_argument("run_file", type=Path, help="of a finished run")
    selecting.add_argument("--images-per-class", type=int, metavar="K")
    selecting.add_argument("--classes-per-image", type=int, metavar="P")
    selecting.add_argument("--min-probability", type=float, metavar="SHARE", help="select nothing below this score")
    selecting.add_argument("--remove", metavar="LIST", help="URI of a text file, one key a line, never to select")
    selecting.set_defaults(verb=lambda options: reselect(options.run_file, changes_of(options)))

    compiling = verbs.add_parser(
        "compile", help="write the YAML that Kubeflow runs", description=compile_pipeline.__doc__
    )
    compiling.add_argument("run_file", type=Path, nargs="?", help="its hardware and values; none: all of manifests/")
    compiling.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.pipeline.yaml")
    compiling.add_argument("--kubernetes", action="store_true", help="as Pipeline and PipelineVersion objects")
    compiling.set_defaults(
        verb=lambda options: compile_pipeline(pipeline, options.run_file, options.output, options.kubernetes)
    )

    building = verbs.add_parser("images", help="build the two container images", description=build_images.__doc__)
    building.add_argument("--push", default="", metavar="PREFIX", help="for example europe-docker.pkg.dev/me/semiscale")
    building.add_argument("options", nargs="*", metavar="-- OPTION", help="for docker build")
    building.set_defaults(verb=lambda options: build_images(options.push, options.options))

    showing = verbs.add_parser("demo", help="run the demo on handwritten digits", description=demo.__doc__)
    showing.set_defaults(verb=lambda _: demo())

    writing = verbs.add_parser("demo-images", help="write the demo's images and stop", description=write_images.__doc__)
    writing.add_argument("folder", type=Path, help="an empty or missing folder")
    writing.add_argument("--seed", type=int, default=0, help="which split is drawn")
    writing.set_defaults(verb=lambda options: write_images(options.folder, options.seed))
    return top


def changes_of(options: argparse.Namespace) -> dict[str, object]:
    """Return the options of a verb that were given, by their names in a config."""
    return {name: value for name, value in vars(options).items() if name not in ("verb", "run_file")}
