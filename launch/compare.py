"""Compare systems by their predictions: `python launch/compare.py RUN_OR_FILE RUN_OR_FILE ...`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare", sys.argv[1:]))
