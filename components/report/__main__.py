"""`python -m components.report`: the stage from a shell."""

import sys

from components.report.report import ReportConfig, report
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(ReportConfig, report))
