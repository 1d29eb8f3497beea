"""Test every node before a long run, and print the names of bad nodes: `sbatch slurm/preflight.sh`."""

import sys

from recurrent_bart.commands.preflight import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
