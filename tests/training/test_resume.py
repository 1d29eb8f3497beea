"""Resumed runs: bitwise equal to uninterrupted runs, also with another world size."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from forked import launched, run_script
from recurrent_bart.checkpointing.checkpoint_files import read_tensors
from recurrent_bart.training.environment import start_processes
from saved_tensors import differing, saved_tensors
from training.resume_worker import CASES, begin_resized, noting_documents, run_all, train

WORKER = Path(__file__).with_name("resume_worker.py")
# suffixes of metrics that are not compared: times and memory
TIMES = ("_per_second", "_per_second_per_device", "_seconds", "_left", "_share", "_bytes", "est_rank")
N_DOCUMENTS = 24


@pytest.fixture(scope="module")
def two_processes(documents, tmp_path_factory):
    """Run with two processes; some of the runs were begun by one process, this one."""
    output = tmp_path_factory.mktemp("resume")
    before = dict(os.environ)
    environment = start_processes(timeout_minutes=2)
    with noting_documents(output / "read-alone.jsonl"):
        for stage in (2, 3):
            begin_resized(environment, documents, output / f"resized{stage}", stage)
    os.environ.clear()
    os.environ.update(before)
    ended = run_script(WORKER, documents, output, environments=launched(2), timeout=280)
    assert ended.codes == [0, 0], ended.text()
    return output


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(TIMES)} for line in lines]


def losses(run):
    return [record["loss"] for record in metrics(run) if "loss" in record]


def check_equal(output, n_processes):
    whole, resumed = output / "whole", output / "resumed"
    assert metrics(resumed) == metrics(whole)
    assert [record["step"] for record in metrics(whole) if "loss" in record] == [2, 4, 6]
    found, expected = (saved_tensors(run / "checkpoints" / "step-00000006") for run in (resumed, whole))
    assert not differing(found, expected)
    # the comparison includes weights, both Adam moments and the random states of each rank
    assert sum("exp_avg" in name for name in expected) >= 2 * n_processes
    assert sum(name.startswith("process-") for name in expected) == n_processes
    assert (resumed / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "changes"), [(2, "bf16", {}), (3, "fp32", {}), (2, "fp32", {"tokens_per_batch": 80})]
)
def test_a_resumed_run_equals_one_that_was_never_cut_off(alone, documents, tmp_path, stage, precision, changes):
    with noting_documents(tmp_path / "read.jsonl"):
        run_all(alone, documents, tmp_path, stage, precision, **changes)
    check_equal(tmp_path, n_processes=1)
    sizes = {len(indices) for _, _, indices in read_notes(tmp_path / "read.jsonl")}
    assert len(sizes) > 1 if changes else sizes == {2}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_resumed_run_of_two_processes_equals_one_that_was_never_cut_off(two_processes, stage, precision):
    output = two_processes / f"zero{stage}-{precision}"
    check_equal(output, n_processes=2)
    # the ranks have different random states
    last = output / "whole" / "checkpoints" / "step-00000006"
    states = [read_tensors(last / f"process-{rank}.pt")["random_states"]["cpu"] for rank in (0, 1)]
    assert not torch.equal(*states)


def read_notes(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
class TestAnotherNumberOfProcesses:
    def test_one_goes_on_for_two(self, two_processes, alone, stage):
        output = two_processes / f"resized{stage}"
        resumed = shutil.copytree(output / "cut-2", output / "one-for-two")
        with noting_documents(two_processes / f"read-one{stage}.jsonl"):
            train(alone, ["--resume", str(resumed), "--gradient_accumulation_steps", "2"])
        self.check_continued(output, resumed)

    def test_two_go_on_for_one(self, two_processes, stage):
        output = two_processes / f"resized{stage}"
        self.check_continued(output, output / "cut-1")

    def check_continued(self, output, resumed):
        whole = output / "whole"
        assert len(losses(whole)) == 3
        assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
        shares = [
            [record["segments_per_document"] for record in metrics(run) if "loss" in record] for run in (resumed, whole)
        ]
        assert shares[0] == pytest.approx(shares[1])
        norms = [[record["gradient_norm"] for record in metrics(run) if "loss" in record] for run in (resumed, whole)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert sorted(path.name for path in (resumed / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]

    def test_no_document_of_the_epoch_is_repeated_or_lost(self, two_processes, alone, stage):
        """Check three steps of four documents by two processes, then six steps of two by one."""
        output = two_processes / f"resized{stage}"
        resumed = shutil.copytree(output / "cut-2", output / "smaller-steps")
        file = two_processes / f"read-smaller{stage}.jsonl"
        with noting_documents(file):
            train(alone, ["--resume", str(resumed), "--max_steps", "9", "--eval_every", "9"])
        own = read_notes(file)
        assert [step for _, step, _ in own] == list(range(3, 9))
        before = [
            index
            for rank in (0, 1)
            for folder, step, indices in read_notes(two_processes / f"read-{rank}.jsonl")
            if Path(folder) == output / "cut-2" and step < 3
            for index in indices
        ]
        after = [index for _, _, indices in own for index in indices]
        assert len(before) == len(after) == N_DOCUMENTS // 2
        assert sorted(before + after) == list(range(N_DOCUMENTS))
