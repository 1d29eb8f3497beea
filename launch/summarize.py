"""Summarise texts of any length: `python launch/summarize.py --model RUN/model FILE`."""

import sys

from recurrent_bart.commands.summarize import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
