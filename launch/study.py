"""Compare models on memory tasks and on documents: `python launch/study.py recurrence`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("study", sys.argv[1:]))
