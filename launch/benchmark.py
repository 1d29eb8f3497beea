"""Compare Recurrent BART with other long-document models: `python launch/benchmark.py --suite quick`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmark", sys.argv[1:]))
