"""Test every node before a long run, and print the names of bad nodes: `sbatch slurm/preflight.sh`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("preflight", sys.argv[1:]))
