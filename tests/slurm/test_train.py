"""`sbatch slurm/train.sh` on two nodes: stop and requeue, lost nodes, and arrays."""

import json
import signal
import time

import psutil
import pytest

from runs import flags
from slurm.cluster import wait_until
from slurm.training_jobs import CHANGES, ENDLESS, TRAIN, records, wait_for_steps

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]


def assert_equal_runs(folder, whole):
    assert records(folder, "loss") == records(whole, "loss")
    assert records(folder, "validation_loss") == records(whole, "validation_loss")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (folder, whole)]
    assert weights[0] == weights[1]


def test_a_run_has_one_process_per_node(whole):
    folder, job = whole
    assert sorted(records(folder, "loss")) == list(range(1, 61))
    assert "2 per device x 1 accumulated x 2 processes" in job.printed()
    assert job.shown()["NodeList"] == "node[1-2]"
    assert job.restarts() == 0
    # Each node has a separate cache folder for Triton.
    assert {"triton-0", "triton-1"} <= {path.name for path in (folder / "caches").iterdir()}


def test_a_run_requeued_at_its_time_limit_gives_the_same_losses(cluster, documents, whole, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **CHANGES))
    wait_for_steps(tmp_path / "run", 5, job)
    job.signal("USR1")
    assert job.wait(250) == "COMPLETED", job.printed()
    assert job.restarts() == 1
    # The output from before the requeue is kept.
    assert job.printed().count("stopping   SIGUSR1") == job.printed().count("stopped    after step") == 1
    assert f"job {job.id} is requeued; the run continues in {tmp_path}/run" in job.printed()
    assert job.printed().count("resumed    after step") == 1
    assert_equal_runs(tmp_path / "run", whole[0])


def test_a_run_that_loses_a_node_continues_on_another_node(cluster, documents, whole, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **CHANGES))
    wait_for_steps(tmp_path / "run", 5, job)
    with cluster.spare_node():
        cluster.lose_node(2)
        wait_until(lambda: job.restarts() == 1, 120, "the job is in the queue again", job)
        assert job.wait(250) == "COMPLETED", job.printed()
    assert job.shown()["NodeList"] == "node[1,3]"
    # No step before the last checkpoint is repeated.
    assert job.printed().count("resumed    after step") == 1
    assert_equal_runs(tmp_path / "run", whole[0])


def test_a_run_with_a_wrong_flag_is_not_requeued(cluster, documents, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", max_stepz=3))
    assert job.wait(100) == "FAILED"
    assert "error: unknown argument --max_stepz; did you mean --max_steps?" in job.printed()
    assert job.restarts() == 0


def test_a_run_stopped_by_a_user_is_not_requeued(cluster, documents, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **ENDLESS))
    wait_for_steps(tmp_path / "run", 2, job)
    (tmp_path / "run" / "stop").touch()
    assert job.wait(60) == "FAILED", job.printed()
    assert job.shown()["ExitCode"] == "75:0"
    assert "the stop file" in job.printed()
    job = cluster.submit(TRAIN, "--resume", tmp_path / "run")
    wait_until(lambda: "resumed    after step" in job.printed(), 100, "it goes on", job)
    job.cancel()
    job.wait(60, "CANCELLED")
    # Wait long enough for an unwanted requeue.
    time.sleep(4)
    assert (job.state(), job.restarts()) == ("CANCELLED", 0), job.printed()


def test_each_array_task_has_separate_folder_flags_and_outcome(cluster, documents, tmp_path):
    folders = {number: tmp_path / "runs" / number for number in "12"}
    lines = tmp_path / "flags.txt"
    lines.write_text("--seed 7 --max_steps 2 --warmup_steps 1\n--seed 8 --max_steps 5000\n")
    given = flags(documents, tmp_path / "runs", **ENDLESS | {"dataloader_num_workers": 0})
    job = cluster.submit(TRAIN, *given, f"@{lines}", options=["--array=1-2", "--nodes=1"])
    wait_for_steps(folders["2"], 3, job)
    # Kill the training process while its node stays up.
    (process,) = (p for p in psutil.process_iter(["cmdline"]) if is_training(p.info["cmdline"], folders["2"]))
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not cluster.ask("squeue", "-h").strip(), 100, "the queue is empty", job)
    time.sleep(1)
    shown = {number: cluster.ask("scontrol", "show", "job", f"{job.id}_{number}") for number in "12"}
    assert "JobState=COMPLETED" in shown["1"]
    assert "JobState=FAILED" in shown["2"]
    assert "Restarts=0" in shown["2"]
    saved = {number: json.loads((folder / "config.json").read_text()) for number, folder in folders.items()}
    assert {number: config["arguments"]["run"]["seed"] for number, config in saved.items()} == {"1": 7, "2": 8}
    assert len(records(folders["1"], "loss")) == 2


def is_training(command, folder):
    """Return True for the training process itself, and False for its parents."""
    return str(folder) in (command or []) and "python" in command[0]
