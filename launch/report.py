"""Write one HTML page that reports on runs: `python launch/report.py RUN [RUN ...]`."""

import sys

from recurrent_bart.commands.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
