"""The declaration of a verb: its help texts, its arguments and its function."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kfp.dsl.graph_component import GraphComponent

Options = argparse.Namespace


@dataclass(frozen=True)
class Command:
    """A verb of the command line.

    Args:
        help: One line for the list of verbs.
        description: Text that `--help` prints above the arguments.
        examples: Arguments of example calls, without the name of the program and the verb.
        add_arguments: Adds the arguments of the verb to its parser.
        execute: Runs the verb with the parsed arguments. `options.program` is the name that the program was
            called by.
    """

    help: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[Options], None]


def load_pipeline(options: Options) -> GraphComponent:
    """Return the pipeline graph, imported from `pipeline` if the caller gave none."""
    if options.pipeline is not None:
        return options.pipeline
    # The console command imports the graph only for the verbs that compile it.
    from pipeline import semiscale

    return semiscale


def non_negative_float(text: str) -> float:
    """Parse a finite number of 0 or more.

    Raises:
        argparse.ArgumentTypeError: The text is another value.
    """
    with suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a number of 0 or more; found {text!r}")


def non_negative_int(text: str) -> int:
    """Parse a whole number of 0 or more.

    Raises:
        argparse.ArgumentTypeError: The text is another value.
    """
    with suppress(ValueError):
        if (value := int(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more; found {text!r}")
