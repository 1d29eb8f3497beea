"""Worker of test_resume.py, also called within its process: interrupted and resumed runs, and uninterrupted runs."""

import contextlib
import json
import sys
from pathlib import Path

import deepspeed.comm

from recurrent_bart.training import session
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.experiment import run_experiment
from recurrent_bart.training.probing import probe_recurrence
from recurrent_bart.training.session import Session
from recurrent_bart.training.trainer import Trainer
from runs import flags

# ZeRO stage and precision of the runs with two processes; one process runs the other two combinations
CASES = [(2, "fp32"), (3, "bf16")]
# the run is cut off one step after a checkpoint that is neither at an evaluation nor at the end of a log line
RESUMED = {
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "dataloader_num_workers": 1,
    "eval_every": 4,
    "save_every": 3,
    "log_every": 2,
}
# Settings of a run that is cut off and continues with another world size. Its checkpoint holds metrics of every rank
# for a log line that the resumed run completes.
RESIZED = {"dropout": 0.0, "hidden_dropout_prob": 0.0, "eval_every": 6, "save_every": 3, "log_every": 2}
CUT_OFF_AFTER = 4


class CutOffError(Exception):
    """Exception that stands for a killed process."""


def train(environment, argv):
    """Train as launch/train.py does."""
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


@contextlib.contextmanager
def noting_documents(file):
    """Record which documents each step of this rank reads."""
    forward_backward = Trainer.forward_backward

    def noting(trainer, batch, n_targets):
        with file.open("a") as notes:
            notes.write(json.dumps([trainer.run.output_dir, trainer.state.step, batch.indices]) + "\n")
        forward_backward(trainer, batch, n_targets)

    Trainer.forward_backward = noting
    try:
        yield
    finally:
        Trainer.forward_backward = forward_backward


def run_all(environment, documents, output, stage, precision, **flags_of_both):
    """Write the runs `whole` and `resumed` to the output folder."""
    changes = {
        "deepspeed": f"ds_configs/zero{stage}.json",
        "precision": precision,
        "async_save": precision == "bf16",
        **RESUMED,
        **flags_of_both,
    }
    train(environment, flags(documents, output / "whole", **changes))
    train_until_cut_off(environment, flags(documents, output / "resumed", **changes))
    train(environment, ["--resume", str(output / "resumed")])


def begin_resized(environment, documents, output, stage):
    """Write a run `cut` for another world size to resume and, with two ranks, a run `whole`."""
    per_process = {1: 2, 2: 1}[environment.world_size]
    changes = {
        "deepspeed": f"ds_configs/zero{stage}.json",
        "gradient_accumulation_steps": per_process,
        **RESIZED,
    }
    if environment.world_size == 2:
        train(environment, flags(documents, output / "whole", **changes))
    train_until_cut_off(environment, flags(documents, output / f"cut-{environment.world_size}", **changes))


if __name__ == "__main__":
    documents, output = map(Path, sys.argv[1:])
    environment, no_probes = start_processes(timeout_minutes=2), session.probe_recurrence
    for stage, precision in CASES:
        # probes of one case; processes of tests leave them out
        session.probe_recurrence = probe_recurrence if (stage, precision) == CASES[0] else no_probes
        run_all(environment, documents, output / f"zero{stage}-{precision}", stage, precision)
    with noting_documents(output / f"read-{environment.rank}.jsonl"):
        for stage in (2, 3):
            begin_resized(environment, documents, output / f"resized{stage}", stage)
            # a run that one process began
            cut = str(output / f"resized{stage}" / "cut-1")
            train(environment, ["--resume", cut, "--gradient_accumulation_steps", "1"])
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()
