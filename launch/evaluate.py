"""Evaluate a model: `python launch/evaluate.py --model RUN/model --split validation`."""

import sys

from recurrent_bart.commands.evaluate import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
