"""Summarise texts of any length: `python launch/summarize.py --model RUN/model FILE`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("summarize", sys.argv[1:]))
