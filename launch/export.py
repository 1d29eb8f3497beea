"""Write the model of a checkpoint to a folder: `python launch/export.py RUN/checkpoints/step-00000100 FOLDER`."""

import sys

from recurrent_bart.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
