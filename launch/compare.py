"""Compare systems by their predictions: `python launch/compare.py RUN_OR_FILE RUN_OR_FILE ...`."""

import sys

from recurrent_bart.commands.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
