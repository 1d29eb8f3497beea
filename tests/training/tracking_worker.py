"""Worker of test_tracking.py: runs launch/train.py; if told to, kills itself in a step after a checkpoint."""

import os
import signal
import sys

import deepspeed.comm

from recurrent_bart.training import session as sessions
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.experiment import run_experiment
from recurrent_bart.training.probing import probe_recurrence
from recurrent_bart.training.session import Session

KILLED_AFTER = 3

# forked runs leave the probes out otherwise; here every field is expected
sessions.probe_recurrence = probe_recurrence

if os.environ.get("KILL"):
    log = Session.log

    def log_and_die(session, record):
        log(session, record)
        if record["step"] == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    Session.log = log_and_die

run_experiment(parse_arguments(sys.argv[1:]), start_processes(timeout_minutes=2))
deepspeed.comm.barrier()
deepspeed.comm.destroy_process_group()
