"""Steps of an engine with our patches of DeepSpeed and without them, which must have the same bits."""

import json

import torch

import launching
from forked import launched, run_script

WORKER = launching.TESTS / "training" / "zero" / "compared_steps_worker.py"
DEFAULT = {
    "fields": {},
    "zero": {},
    "bf16": True,
    "n_passes": 1,
    "checkpointing": "none",
    "frozen": False,
    "evaluates": False,
    "saves": False,
}


def case(**changes):
    """Return the settings of a case for the worker."""
    return DEFAULT | changes


def run_cases(cases, n_processes, output):
    """Run all cases in one start of the processes. Return what each case found, with the patches and without."""
    given = json.dumps(list(cases.values()))
    ended = run_script(WORKER, given, output, environments=launched(n_processes), timeout=500)
    assert set(ended.codes) == {0}, ended.text()
    return dict(zip(cases, torch.load(output, weights_only=True), strict=True))


def assert_equal_bits(name, found, expected):
    """Compare losses, gradients and weights of a case."""
    assert found["losses"] == expected["losses"], name
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert all(map(torch.equal, ours, theirs)), name
    assert all(torch.equal(found["weights"][key], expected["weights"][key]) for key in expected["weights"]), name
