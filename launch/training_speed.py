"""Measure the cost of processes, sharding and the training loop: `python launch/training_speed.py`."""

import sys

from recurrent_bart.commands.training_speed import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
