"""The command line of `pipeline.py`: verbs, their help, their exit codes."""

import argparse
import inspect
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from kfp.dsl.graph_component import GraphComponent

from semiscale.cli.build_images import build_images
from semiscale.cli.cancel import cancel
from semiscale.cli.compile import compile_pipeline
from semiscale.cli.demo import demo, write_images
from semiscale.cli.export import export
from semiscale.cli.kfp_client import SERVICE_ACCOUNT, Server
from semiscale.cli.measure import measure
from semiscale.cli.model_source import MODELS, SOURCE_HELP
from semiscale.cli.plan import estimate_cost
from semiscale.cli.promote import promote, rollback
from semiscale.cli.rates import RateOverrides
from semiscale.cli.reselect import reselect
from semiscale.cli.run_local import run
from semiscale.cli.schedule import schedule
from semiscale.cli.submit import submit
from semiscale.cli.transfer import SETTINGS, transfer
from semiscale.cli.watch import watch
from semiscale.common.signals import sigterm_handler
from semiscale.observability.progress import LOG_FORMAT_ENV, log_fatal
from semiscale.runtime.entrypoints import run_with_exit_code

Options = argparse.Namespace
Verbs = Any  # what argparse calls the group of sub-parsers has no public name

EXIT_CODES = """exit codes:
  0  all of it was done
  1  it failed on the way; what was finished is kept, run it again
  2  bad input, refused with one line; before any training, but for a pool that turns out to be unreadable
  3  the run's budget is spent; what was finished is kept
130  interrupted (Ctrl-C); run it again to go on
143  told to stop (SIGTERM); run it again to go on
"""


def main(pipeline: GraphComponent, arguments: Sequence[str]) -> int:
    """Run a verb; returns its exit code. Errors are one line on standard error."""
    os.environ.setdefault(
        LOG_FORMAT_ENV, "plain"
    )  # what a verb and its tasks print is for people, unless asked otherwise
    options = build_parser(pipeline).parse_args(arguments)
    verb: Callable[[Options], None] = options.verb
    try:
        with sigterm_handler(raise_keyboard_interrupt):
            return run_with_exit_code(lambda: verb(options))
    except KeyboardInterrupt as told:
        number = told.args[0] if told.args else signal.SIGINT
        why = "interrupted" if number == signal.SIGINT else "told to stop"
        log_fatal(f"{why}: what was finished is kept, run it again to go on", 128 + number)
        return int(128 + number)


def raise_keyboard_interrupt(number: int, frame: FrameType | None) -> None:
    """Have a signal end a verb as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def build_parser(pipeline: GraphComponent) -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = argparse.ArgumentParser(
        prog="pipeline.py",
        description="A small labeled set and a huge unlabeled pool: a better classifier at the same inference cost.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")
    add_run(verbs)
    add_plan(verbs)
    add_watch(verbs)
    add_cluster(verbs, pipeline)
    add_reselect(verbs)
    add_promote(verbs)
    add_measure(verbs)
    add_transfer(verbs)
    add_export(verbs)
    add_compile(verbs, pipeline)
    add_demo(verbs)
    return top


def add_command(
    verbs: Verbs, name: str, about: str, act: Callable[..., None], *examples: str
) -> argparse.ArgumentParser:
    """Add a verb: its description is the function's, its examples are shown by --help."""
    text = "".join(f"  python pipeline.py {name} {example}".rstrip() + "\n" for example in examples)
    adding: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about,
        description=inspect.getdoc(act),
        epilog=f"examples:\n{text}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return adding


def add_run(verbs: Verbs) -> None:
    """Add `run`."""
    running = add_command(
        verbs, "run", "run the whole pipeline on this machine", run, "my-run.yaml", "my-run.yaml --docker"
    )
    running.add_argument("run_file", type=Path, help="for example manifests/runs/demo.yaml")
    running.add_argument("--docker", action="store_true", help="each task in its container, as on a cluster")
    running.set_defaults(verb=lambda options: run(options.run_file, options.docker))


def add_plan(verbs: Verbs) -> None:
    """Add `plan`; every rate that can be stated is an option."""
    examples = (
        "my-run.yaml",
        "my-run.yaml --gpu-price-per-h 2.5 --cpus-per-device 24 --budget 5000",
        "my-run.yaml --rates a100.yaml --teacher-forward-images-per-s 1700",
    )
    planning = add_command(verbs, "plan", "hours, cost and requests of a run before spending", estimate_cost, *examples)
    planning.add_argument("run_file", type=Path)
    planning.add_argument(
        "--budget", type=non_negative_float, default=0.0, metavar="MONEY", help="refuse a run that costs more"
    )
    planning.add_argument(
        "--classes", type=non_negative_int, default=0, metavar="N", help="where no list or folders tell how many"
    )
    planning.add_argument(
        "--rates", type=Path, metavar="FILE", help="YAML with the names below, underscores for dashes"
    )
    for name, field in RateOverrides.model_fields.items():
        planning.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=field.description)

    def act(options: Options) -> None:
        given = {name: value for name in RateOverrides.model_fields if (value := getattr(options, name)) is not None}
        estimate_cost(options.run_file, given, options.rates, options.classes, options.budget)

    planning.set_defaults(verb=act)


def add_watch(verbs: Verbs) -> None:
    """Add `watch`."""
    watching = add_command(
        verbs, "watch", "live progress of a run, here or on a cluster", watch, "my-run.yaml", "my-run.yaml --once"
    )
    watching.add_argument("run_file", type=Path)
    watching.add_argument("--once", action="store_true", help="one look, and the run's exit code if it has ended")
    watching.add_argument(
        "--every", type=non_negative_float, default=5.0, metavar="SECONDS", help="between two looks (5)"
    )
    watching.set_defaults(verb=lambda options: watch(options.run_file, options.once, options.every))


def add_cluster(verbs: Verbs, pipeline: GraphComponent) -> None:
    """Add the verbs that talk to Kubeflow Pipelines."""
    submitting = add_command(
        verbs,
        "submit",
        "run it on Kubeflow",
        submit,
        "my-run.yaml",
        "my-run.yaml --host https://kubeflow.example/pipeline",
    )
    submitting.add_argument("run_file", type=Path)
    submitting.set_defaults(
        verb=lambda options: submit(pipeline, options.run_file, server_from_options(options), options.images_on_nodes)
    )
    scheduling = add_command(
        verbs, "schedule", "run it on Kubeflow again and again", schedule, "my-run.yaml --cron '0 2 * * *'"
    )
    scheduling.add_argument("run_file", type=Path)
    scheduling.add_argument("--cron", required=True, help="minute hour day month weekday, UTC")
    scheduling.set_defaults(
        verb=lambda options: schedule(
            pipeline, options.run_file, options.cron, server_from_options(options), options.images_on_nodes
        )
    )
    cancelling = add_command(
        verbs, "cancel", "end runs on Kubeflow", cancel, "my-run.yaml", "5d6f1c3e-8a1b-4a53-9d57-0e6b7f5f3c1a"
    )
    cancelling.add_argument("run", metavar="RUN", help="a run file, or the id of a run")
    cancelling.set_defaults(verb=lambda options: cancel(options.run, server_from_options(options)))
    for starting in (submitting, scheduling):
        starting.add_argument(
            "--service-account", default=SERVICE_ACCOUNT, metavar="NAME", help="that the pods run as (%(default)s)"
        )
        starting.add_argument(
            "--images-on-nodes", action="store_true", help="the nodes have the images; no registry is needed"
        )
    for asking in (submitting, scheduling, cancelling):
        asking.add_argument("--host", default="", help="of Kubeflow Pipelines; default: as kfp is configured")
        asking.add_argument("--namespace", default="", help="of the user, where Kubeflow has several")


def server_from_options(options: Options) -> Server:
    """Return which server a verb was told to talk to."""
    return Server(options.host, options.namespace, getattr(options, "service_account", SERVICE_ACCOUNT))


def add_reselect(verbs: Verbs) -> None:
    """Add `reselect`."""
    about = "select again from a run's scores, without scoring"
    selecting = add_command(
        verbs, "reselect", about, reselect, "my-run.yaml --images-per-class 8000 --remove gs://b/opt-outs.txt"
    )
    selecting.add_argument("run_file", type=Path, help="of a run whose pool has been scored")
    selecting.add_argument("--images-per-class", type=int, metavar="K")
    selecting.add_argument("--classes-per-image", type=int, metavar="P")
    selecting.add_argument("--min-probability", type=float, metavar="SHARE", help="select nothing below this score")
    selecting.add_argument("--remove", metavar="LIST", help="URI of a text file, one key a line, never to select")
    selecting.set_defaults(verb=lambda options: reselect(options.run_file, given_options(options)))


def add_measure(verbs: Verbs) -> None:
    """Add `measure`."""
    examples = ("my-run.yaml other-run.yaml --model baseline", "my-run.yaml s3://bucket/model.safetensors")
    measuring = add_command(verbs, "measure", "one trained model on a run file's test set", measure, *examples)
    measuring.add_argument("run_file", type=Path, help="whose test set and classes")
    measuring.add_argument("source", help=SOURCE_HELP)
    measuring.add_argument("--model", choices=MODELS, default="student", help="which one of the finished run's")
    measuring.set_defaults(verb=lambda options: measure(options.run_file, options.source, options.model))


def add_transfer(verbs: Verbs) -> None:
    """Add `transfer`."""
    about = "train a model on for other classes, and measure it"
    examples = ("birds.yaml my-run.yaml", "birds.yaml resnet50.pth --setting fc-only")
    transferring = add_command(verbs, "transfer", about, transfer, *examples)
    transferring.add_argument("run_file", type=Path, help="of the new classes; `unlabeled: []` where there is no pool")
    transferring.add_argument("start", help=f"{SOURCE_HELP}, or weights from elsewhere (.pth, .pt)")
    transferring.add_argument(
        "--setting", choices=SETTINGS, default=SETTINGS[0], help="train every layer (%(default)s), or the head alone"
    )
    transferring.add_argument("--learning-rate", type=float, metavar="RATE", help="for 256 images (0.0025)")
    transferring.add_argument("--epochs", type=int, metavar="N", help="over the labeled set (300)")

    def act(options: Options) -> None:
        given = {name: value for name in ("learning_rate", "epochs") if (value := getattr(options, name)) is not None}
        transfer(options.run_file, options.start, options.setting, given)

    transferring.set_defaults(verb=act)


def add_export(verbs: Verbs) -> None:
    """Add `export`."""
    exporting = add_command(
        verbs,
        "export",
        "write a model as an ONNX or torch.export file",
        export,
        "my-run.yaml --format onnx --to s3://bucket/serving",
    )
    exporting.add_argument("source", help=SOURCE_HELP)
    exporting.add_argument("--format", choices=["onnx", "torch"], default="onnx")
    exporting.add_argument("--model", choices=MODELS, default="student", help="which one of the run file's run")
    exporting.add_argument("--to", default="", metavar="FOLDER", help="URI; default: in the run, or by the checkpoint")
    exporting.set_defaults(verb=lambda options: export(options.source, options.format, options.model, options.to))


def add_promote(verbs: Verbs) -> None:
    """Add `promote`."""
    promoting = add_command(
        verbs,
        "promote",
        "make a run's student the champion, or go back",
        promote,
        "my-run.yaml",
        "my-run.yaml --rollback",
    )
    promoting.add_argument("run_file", type=Path, help="of a finished run")
    one = promoting.add_mutually_exclusive_group()
    one.add_argument("--force", action="store_true", help="whatever the comparison says")
    one.add_argument("--rollback", action="store_true", help="withdraw the champion for the one before it")
    promoting.set_defaults(
        verb=lambda options: (
            rollback(options.run_file) if options.rollback else promote(options.run_file, options.force)
        )
    )


def add_compile(verbs: Verbs, pipeline: GraphComponent) -> None:
    """Add `compile` and `images`: what a cluster is given."""
    examples = ("my-run.yaml", "my-run.yaml --kubernetes -o objects.yaml", "")
    compiling = add_command(verbs, "compile", "write the YAML that Kubeflow runs", compile_pipeline, *examples)
    compiling.add_argument("run_file", type=Path, nargs="?", help="its hardware and values; none: all of manifests/")
    compiling.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.pipeline.yaml")
    compiling.add_argument("--kubernetes", action="store_true", help="as Pipeline and PipelineVersion objects")
    compiling.set_defaults(
        verb=lambda options: compile_pipeline(pipeline, options.run_file, options.output, options.kubernetes)
    )
    building = add_command(
        verbs, "images", "build the two container images", build_images, "--push europe-docker.pkg.dev/me"
    )
    building.add_argument("--push", default="", metavar="PREFIX", help="for example europe-docker.pkg.dev/me/semiscale")
    building.add_argument("options", nargs="*", metavar="-- OPTION", help="for docker build")
    building.set_defaults(verb=lambda options: build_images(options.push, options.options))


def add_demo(verbs: Verbs) -> None:
    """Add the demo's verbs."""
    showing = add_command(verbs, "demo", "run the demo on handwritten digits", demo, "")
    showing.set_defaults(verb=lambda _: demo())
    writing = add_command(verbs, "demo-images", "write the demo's images and stop", write_images, "digits --seed 7")
    writing.add_argument("folder", type=Path, help="an empty or missing folder")
    writing.add_argument("--seed", type=non_negative_int, default=0, help="which split is drawn")
    writing.set_defaults(verb=lambda options: write_images(options.folder, options.seed))


def non_negative_float(text: str) -> float:
    """Return a number of a command line. Raises ArgumentTypeError for what is none, below 0 or without end."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a number of 0 or more; found {text!r}")


def non_negative_int(text: str) -> int:
    """Return a whole number of a command line. Raises ArgumentTypeError for what is none, or below 0."""
    with suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more; found {text!r}")


def given_options(options: Options) -> dict[str, object]:
    """Return the options of a verb that were given, by their names in a config."""
    return {name: value for name, value in vars(options).items() if name not in ("verb", "run_file")}
