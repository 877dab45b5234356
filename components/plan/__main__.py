"""`python -m components.plan`: the stage from a shell."""

import sys

from components.plan.plan import PlanConfig, plan
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(PlanConfig, plan))
