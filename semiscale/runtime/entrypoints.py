"""Run stages from a shell, from a kfp component, or as a task of a run.

A stage is a function `stage(config) -> Receipt`.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, cast

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from semiscale import storage
from semiscale.common import parent_exit
from semiscale.common.errors import InvalidInputError, SemiscaleError
from semiscale.config.form import SETTINGS
from semiscale.config.run_parameters import RunParameters
from semiscale.config.validation_errors import format_validation_error
from semiscale.observability import prometheus, status_reporter, task_status
from semiscale.observability.progress import log_fatal, use_json_logs
from semiscale.receipts.base import Receipt
from semiscale.receipts.markdown import summarize
from semiscale.runtime.lineage import publish, resolve_inputs
from semiscale.runtime.run_once import R
from semiscale.runtime.stage_config import C, StageConfig
from semiscale.runtime.supervisor import supervise

# A component takes these arguments in addition to the fields of its config.
NOT_IN_CONFIG = ("role", SETTINGS)


def run_from_cli(config_type: type[C], stage: Callable[[C], Receipt], prints: bool = True) -> int:
    """Run a stage from a shell, with the fields of its config as options.

    Args:
        config_type: Config of the stage.
        stage: The stage.
        prints: Whether to print the receipt.

    Returns:
        The exit code of the process.
    """
    settings = SettingsConfigDict(cli_kebab_case=True, cli_prog_name=f"python -m semiscale.stages.{config_type.stage}")
    options = type(config_type.__name__, (config_type, BaseSettings), {"model_config": settings})
    try:
        parsed: Any = CliApp.run(options, cli_args=sys.argv[1:])
    except ValidationError as error:
        reason = format_validation_error(error, config_type.model_fields)
        log_fatal(f"refused: {reason} [SEMI-E100]", InvalidInputError.exit_code)
        return InvalidInputError.exit_code
    fields = {name: getattr(parsed, name) for name in config_type.model_fields}
    # Among JSON log lines, the receipt is one line too.
    indent = None if use_json_logs(sys.stdout) else 1

    def run() -> None:
        receipt = run_as_task(config_type(**fields), stage)
        if prints:
            print(receipt.model_dump_json(indent=indent))

    return run_with_exit_code(run)


class FinishedTask(NamedTuple, Generic[R]):
    """The receipt of a stage that ran in a kfp component, and its run's parameters."""

    receipt: R
    run: RunParameters


def run_in_kfp(config_type: type[C], stage: Callable[[C], R], arguments: Mapping[str, Any]) -> FinishedTask[R]:
    """Run a stage inside a kfp component.

    If the stage fails, its error is logged in one line and the process exits with the error's code. In a pod, a stage
    that crashes is started again (supervisor.py).

    Args:
        config_type: Config of the stage.
        stage: The stage.
        arguments: Local variables of the component. Input artifacts are replaced by their paths. The receipt is written
            to the output artifact `receipt`. Its summary is written to the output artifact `summary`, if there is one.

    Returns:
        The receipt, and the run's parameters.

    Raises:
        SystemExit: The stage failed.
    """
    supervise(config_type.stage, config_type.shares_work)
    parent_exit.exit_with_parent()
    names = {*config_type.model_fields, *NOT_IN_CONFIG}
    inputs = {name: _to_plain_argument(value) for name, value in arguments.items() if name in names}
    finished: list[FinishedTask[R]] = []

    def run() -> None:
        task = resolve_inputs(config_type, inputs)
        receipt = run_as_task(cast(C, task.config), stage)
        finished.append(FinishedTask(publish(receipt, task.run, task.lineage), task.run))

    if code := run_with_exit_code(run):
        sys.exit(code)
    Path(arguments["receipt"].path).write_text(finished[0].receipt.model_dump_json(indent=1))
    if "summary" in arguments:
        Path(arguments["summary"].path).write_text(summarize(finished[0].receipt))
    return finished[0]


def run_as_task(config: C, stage: Callable[[C], R]) -> R:
    """Run a stage as a task of its run, with metrics and a status object.

    A stage without a run has neither, and only rank 0 reports.

    Args:
        config: Config of the stage.
        stage: The stage.

    Returns:
        The receipt of the stage.

    Raises:
        InvalidInputError: The previous attempt of the task was refused, or the config cannot start.
        BudgetExceededError: The budget of the run is used up.
    """
    run = _run_name_and_budget(config)
    if not run or os.environ.get("RANK", "0") != "0":
        return stage(config)
    status_store = task_status.RunStatusStore(config.workdir, run[0])
    with prometheus.serve_metrics(config.stage, config.task_name()):
        status_reporter.fail_fast_on_retry(status_store, config.task_name())
        config.check_can_start()
        with status_reporter.report_status(status_store, config.task_name(), config.stage, config.on_device, run[1]):
            return stage(config)


def _run_name_and_budget(config: StageConfig) -> tuple[str, float] | None:
    """Return the name and the budget of a config's run, or None without a plan."""
    name = getattr(config, "name", None)
    if name is not None:
        return name, 0.0
    try:
        plan = json.loads(storage.read_bytes(getattr(config, "plan", "")))
        return plan["name"], plan["run"].get("budget_hours", 0.0)
    # The stage itself reports the errors of its inputs.
    except (OSError, SemiscaleError, LookupError, TypeError, ValueError):
        return None


def _to_plain_argument(argument: Any) -> Any:
    # An optional artifact that is not given is None.
    if argument is None:
        return ""
    if isinstance(argument, list):
        return [_to_plain_argument(item) for item in argument]
    return getattr(argument, "path", argument)


def run_with_exit_code(run: Callable[[], None]) -> int:
    """Run a stage or a verb, and log its error in one line.

    Returns:
        The exit code of the process, which is 0 without an error.
    """
    try:
        run()
    except ValidationError as error:
        log_fatal(f"refused: {format_validation_error(error, ())} [SEMI-E100]", InvalidInputError.exit_code)
        return InvalidInputError.exit_code
    except SemiscaleError as error:
        log_fatal(f"{'refused' if isinstance(error, InvalidInputError) else 'failed'}: {error}", error.exit_code)
        return error.exit_code
    except OSError as error:
        # The text of a store's FileNotFoundError is only the URI.
        missing = ": no such file" if isinstance(error, FileNotFoundError) and not error.errno else ""
        log_fatal(
            f"failed: {error}{missing}. Finished work is kept. Run it again to continue. [SEMI-E001]",
            SemiscaleError.exit_code,
        )
        return SemiscaleError.exit_code
    return 0
