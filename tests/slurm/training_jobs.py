"""Training jobs that are long enough to interrupt, and their results."""

import json

from slurm.cluster import wait_until

TRAIN = "slurm/train.sh"
CHANGES = {"max_steps": 60, "eval_every": 60, "save_every": 4, "dropout": 0.1, "dataloader_num_workers": 1}
# The job runs until something ends it.
ENDLESS = CHANGES | {"max_steps": 5000, "eval_every": 5000}


def records(folder, name):
    """Return the values of a metric by step, as far as the run has come."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record[name] for record in found if name in record}


def wait_for_steps(folder, n_steps, job):
    wait_until(lambda: len(records(folder, "loss")) >= n_steps, 120, f"{n_steps} steps are done", job)
