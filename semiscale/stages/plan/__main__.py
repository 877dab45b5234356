"""`python -m semiscale.stages.plan`: the stage from a shell."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.plan.stage import PlanConfig, plan

if __name__ == "__main__":
    sys.exit(run_from_cli(PlanConfig, plan))
