"""Serve summaries and sessions over HTTP: `python launch/serve.py --model RUN/model`."""

import sys

from recurrent_bart.commands.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
