"""`python -m components.pack`: the stage from a shell."""

import sys

from components.pack.pack import PackConfig, pack
from components.shared.stage import command_line

if __name__ == "__main__":
    sys.exit(command_line(PackConfig, pack))
