"""`python -m components.promote`: the stage from a shell."""

import sys

from components.promote.promote import PromoteConfig, promote
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(PromoteConfig, promote))
