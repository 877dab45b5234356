"""Run the report stage from a shell: `python -m semiscale.stages.report`."""

import sys

from semiscale.runtime.entrypoints import run_from_cli
from semiscale.stages.report.stage import ReportConfig, report

if __name__ == "__main__":
    sys.exit(run_from_cli(ReportConfig, report))
