"""Write the model of a checkpoint to a folder: `python launch/export.py RUN/checkpoints/step-00000100 FOLDER`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("export", sys.argv[1:]))
