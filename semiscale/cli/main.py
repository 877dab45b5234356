"""The entry point of the command line: the table of verbs and the exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from kfp.dsl.graph_component import GraphComponent

from semiscale.cli import (
    cancel,
    compile,
    demo,
    demo_images,
    export,
    images,
    measure,
    plan,
    promote,
    reselect,
    run,
    schedule,
    submit,
    transfer,
    watch,
)
from semiscale.cli.command import Command
from semiscale.common.signals import signal_handler
from semiscale.observability.progress import LOG_FORMAT_ENV, log_fatal
from semiscale.runtime.entrypoints import run_with_exit_code

# The verbs in the order in which `--help` lists them.
COMMANDS: dict[str, Command] = {
    "run": run.COMMAND,
    "plan": plan.COMMAND,
    "watch": watch.COMMAND,
    "submit": submit.COMMAND,
    "schedule": schedule.COMMAND,
    "cancel": cancel.COMMAND,
    "reselect": reselect.COMMAND,
    "promote": promote.COMMAND,
    "measure": measure.COMMAND,
    "transfer": transfer.COMMAND,
    "export": export.COMMAND,
    "compile": compile.COMMAND,
    "images": images.COMMAND,
    "demo": demo.COMMAND,
    "demo-images": demo_images.COMMAND,
}

EXIT_CODES = """exit codes:
  0  everything was done
  1  the command failed; finished work is kept, run the command again to continue
  2  the input is bad and was refused in one line, before any training unless the pool proves unreadable
  3  the budget of the run is used up; finished work is kept
  4  no task follows the Job of this pod any more; finished work is kept, submit the run again to continue
129  the terminal was closed (SIGHUP); run the command again to continue
130  the command was interrupted (Ctrl-C); run it again to continue
143  the command was terminated (SIGTERM); run it again to continue
"""


def main(pipeline: GraphComponent | None, arguments: Sequence[str], program: str = "python pipeline.py") -> int:
    """Run a verb and report an error as one line on standard error.

    Args:
        pipeline: The pipeline graph. None: verbs that need it import it from the module `pipeline`.
        arguments: The verb and its arguments.
        program: Name by which the program was called. Help texts and messages show it.

    Returns:
        The exit code.
    """
    # The output of a verb and of its tasks is for people, unless the environment asks for JSON.
    os.environ.setdefault(LOG_FORMAT_ENV, "plain")
    options = build_parser(pipeline, program).parse_args(arguments)
    command: Command = options.command
    try:
        with signal_handler(raise_keyboard_interrupt, signal.SIGTERM, signal.SIGHUP):
            return run_with_exit_code(lambda: command.execute(options))
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        reason, code = ("interrupted", "SEMI-E400") if number == signal.SIGINT else ("terminated", "SEMI-E002")
        log_fatal(f"{reason}: Finished work is kept. Run the same command again to continue. [{code}]", 128 + number)
        return int(128 + number)


def run_console_command() -> int:
    """Run the console command `semiscale` and return its exit code."""
    return main(None, sys.argv[1:], program="semiscale")


def raise_keyboard_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for a signal, so that it ends a verb as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def build_parser(pipeline: GraphComponent | None, program: str = "python pipeline.py") -> argparse.ArgumentParser:
    """Build the parser of all verbs.

    Args:
        pipeline: The pipeline graph, or None to import it when a verb needs it.
        program: Name by which the program was called.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="A small labeled set and a huge unlabeled pool: a better classifier at the same inference cost.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "".join(f"  {program} {name} {example}".rstrip() + "\n" for example in command.examples)
        verb_parser = verbs.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=f"examples:\n{examples}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(verb_parser)
        verb_parser.set_defaults(command=command, pipeline=pipeline, program=program)
    return parser
