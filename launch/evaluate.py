"""Evaluate a model: `python launch/evaluate.py --model RUN/model --split validation`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:]))
