"""`python -m semiscale.stages.report`: the stage from a shell."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.report.stage import ReportConfig, report

if __name__ == "__main__":
    sys.exit(run_from_cli(ReportConfig, report))
