"""Show which parts of a document a model reads from the state: `python launch/memory_map.py --model RUN/model FILE`."""

import sys

from recurrent_bart.commands.memory_map import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
