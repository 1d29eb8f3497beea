"""Measure the cost of processes, sharding and the training loop: `python launch/training_speed.py`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("training_speed", sys.argv[1:]))
