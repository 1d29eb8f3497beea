"""Compare Recurrent BART with other long-document models: `python launch/benchmark.py --suite quick`."""

import sys

from recurrent_bart.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
