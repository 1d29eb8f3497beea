"""Write one HTML page that reports on runs: `python launch/report.py RUN [RUN ...]`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("report", sys.argv[1:]))
