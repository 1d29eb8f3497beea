"""Train Recurrent BART: `deepspeed launch/train.py --deepspeed ds_configs/zero3.json`."""

import sys

from recurrent_bart.commands.train import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
