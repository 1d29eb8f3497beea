"""Compare models on memory tasks and on documents: `python launch/study.py recurrence`."""

import sys

from recurrent_bart.commands.study import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
