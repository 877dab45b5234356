"""Collect the facts in the head of the page: date, version, device and elapsed time."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from semiscale import storage
from semiscale.common.version import program_version
from semiscale.observability.task_status import RunStatusStore
from semiscale.stages.report.run_receipts import RunReceipts


@dataclass(frozen=True)
class PageHeader:
    """When, by which program and on which device the run was made.

    Attributes:
        written: Date and time of the page, UTC.
        version: Version of the program.
        scored_on: Device that scored the pool.
        elapsed_s: Seconds from the start of the plan to the page, or None if no task left its status.
    """

    written: str
    version: str
    scored_on: str
    elapsed_s: float | None


def load_page_header(run: RunReceipts, workdir: str) -> PageHeader:
    """Load the facts in the head of the page.

    Args:
        run: The receipts of the run.
        workdir: URI of the workdir.

    Returns:
        The facts. The elapsed time is that of the latest attempt.

    Cost:
        Reads the status of every task, at most a few hundred small objects.
    """
    tasks = RunStatusStore(workdir, run.plan.name).current_tasks()
    elapsed_s = max(task.updated for task in tasks) - min(task.started for task in tasks) if tasks else None
    return PageHeader(
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=program_version(),
        scored_on=_scoring_device(run.scores[0].folder),
        elapsed_s=elapsed_s,
    )


def _scoring_device(folder: str) -> str:
    """Return the card that scored the pool. Only a GPU leaves a decision about its execution mode."""
    decision = storage.read_or_none(storage.join(folder, "decision.json"))
    return (json.loads(decision).get("on") or "a GPU") if decision else "CPU"
