"""Started by test_resume.py, or called in its process: a run that is cut off and resumed, and one that is not."""

import sys
from pathlib import Path

import deepspeed.comm

from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.experiment import Session, run_experiment
from runs import flags

# a checkpoint is written after every second step
CUT_OFF_AFTER = 5


class CutOffError(Exception):
    """The end of a process, as far as it can be had without one."""


def train(environment, argv):
    """As launch/train.py does."""
    return run_experiment(parse_arguments(argv), environment)


def train_until_cut_off(environment, argv):
    """End a run in the step after a checkpoint, once that step is in the log."""
    log = Session.log

    def log_and_end(session, record):
        log(session, record)
        if record["step"] == CUT_OFF_AFTER:
            raise CutOffError

    Session.log = log_and_end
    try:
        train(environment, argv)
    except CutOffError:
        return
    finally:
        Session.log = log
    raise AssertionError("the run was not cut off")


def run_all(environment, documents, output, stage):
    """Write the runs `whole` and `resumed` under the output folder."""
    changes = {
        "deepspeed": f"ds_configs/zero{stage}.json",
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
        "hidden_dropout_prob": 0.1,
    }
    train(environment, flags(documents, output / "whole", **changes))
    train_until_cut_off(environment, flags(documents, output / "resumed", **changes))
    train(environment, ["--resume", str(output / "resumed")])


if __name__ == "__main__":
    environment = start_processes(timeout_minutes=2)
    for stage in (2, 3):
        run_all(environment, Path(sys.argv[1]), Path(sys.argv[2]) / f"zero{stage}", stage)
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
