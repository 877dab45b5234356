"""`python -m components.merge`: the stage from a shell."""

import sys

from components.merge.merge import MergeConfig, merge
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(MergeConfig, merge))
