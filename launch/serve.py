"""Serve summaries and sessions over HTTP: `python launch/serve.py --model RUN/model`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("serve", sys.argv[1:]))
