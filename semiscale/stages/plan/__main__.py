"""Run the plan stage from a shell: `python -m semiscale.stages.plan`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.plan.stage import PlanConfig, plan

if __name__ == "__main__":
    sys.exit(run_from_cli(PlanConfig, plan))
