"""Fixtures for fault tests: a short run, an injected fault, and checks afterwards."""

import json

import pytest

from faults.processes_of_a_run import train
from recurrent_bart.checkpointing.manifest import problems
from runs import flags

# each of two ranks generates two texts
SHORT_EVALUATIONS = {"eval_documents": 4}


class RunUnderTest:
    """Short run in a separate folder."""

    def __init__(self, documents, folder):
        self.documents, self.folder = documents, folder / "run"
        self.checkpoints = self.folder / "checkpoints"

    def train(self, n_processes=2, fault=None, changes=None, **options):
        """Start the run; see `processes_of_a_run.train`."""
        arguments = flags(self.documents, self.folder, **SHORT_EVALUATIONS | (changes or {}))
        return train(arguments, n_processes, fault, **options)

    def resume(self, n_processes=2, fault=None, changes=None, **options):
        """Resume the run."""
        arguments = ["--resume", self.folder, *(f"--{name}={value}" for name, value in (changes or {}).items())]
        return train(arguments, n_processes, fault, **options)

    def steps(self):
        """Return the steps of all checkpoints; check that each is complete."""
        found = sorted(self.checkpoints.glob("step-*"))
        for checkpoint in found:
            assert problems(checkpoint) == []
        return [int(checkpoint.name.removeprefix("step-")) for checkpoint in found]

    def outcome(self):
        return json.loads((self.folder / "outcome.json").read_text())

    def records(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def losses(self):
        return {record["step"]: record["loss"] for record in self.records() if "loss" in record}

    def evaluations(self):
        return {record["step"]: record["validation_loss"] for record in self.records() if "validation_loss" in record}


@pytest.fixture
def run(documents, tmp_path):
    return RunUnderTest(documents, tmp_path)
