"""Show which parts of a document a model reads from the state: `python launch/memory_map.py --model RUN/model FILE`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("memory_map", sys.argv[1:]))
