"""Started by test_train.py, as launch/train.py but for an error that nobody foresaw, on one process."""

import sys

from launch.train import main
from recurrent_bart.distributed import rank
from recurrent_bart.training.trainer import Trainer

train_step = Trainer.train_step


def crash_once(trainer):
    if trainer.state.step == 1 and rank() == 1:
        raise RuntimeError("nobody foresaw this")
    train_step(trainer)


Trainer.train_step = crash_once

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
