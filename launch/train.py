"""Train Recurrent BART: `deepspeed launch/train.py --deepspeed ds_configs/zero3.json`."""

import sys

from recurrent_bart_cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
