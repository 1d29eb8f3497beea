"""`sbatch slurm/train.sh`: over two nodes, stopped and put back into the queue, with a node lost, in an array."""

import json
import time

import pytest

from runs import flags
from slurm.cluster import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]
TRAIN = "slurm/train.sh"
# long enough to be cut off in the middle
CHANGES = {"max_steps": 60, "eval_every": 60, "save_every": 4, "dropout": 0.1, "dataloader_num_workers": 1}


def records(folder, name):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record[name] for record in found if name in record}


def wait_for_steps(folder, n_steps, job):
    wait_until(lambda: len(records(folder, "loss")) >= n_steps, 120, f"{n_steps} steps are done", job)


@pytest.fixture(scope="module")
def whole(cluster, documents, tmp_path_factory):
    """A run that nothing cuts off: its folder and its job."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = cluster.submit(TRAIN, *flags(documents, folder, **CHANGES))
    assert job.wait(200) == "COMPLETED", job.printed()
    return folder, job


def assert_equal_runs(folder, whole):
    assert records(folder, "loss") == records(whole, "loss")
    assert records(folder, "validation_loss") == records(whole, "validation_loss")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (folder, whole)]
    assert weights[0] == weights[1]


def test_a_run_takes_one_process_of_each_node(whole):
    folder, job = whole
    assert sorted(records(folder, "loss")) == list(range(1, 61))
    assert "2 a device x 1 accumulated x 2 processes" in job.printed()
    assert job.shown()["NodeList"] == "node[1-2]"
    assert job.restarts() == 0
    # each node has a place of its own for what Triton builds
    assert {"triton-0", "triton-1"} <= {path.name for path in (folder / "caches").iterdir()}


def test_a_run_whose_time_is_over_goes_on_from_the_queue_to_the_same_numbers(cluster, documents, whole, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **CHANGES))
    wait_for_steps(tmp_path / "run", 5, job)
    job.signal("USR1")
    assert job.wait(250) == "COMPLETED", job.printed()
    assert job.restarts() == 1
    # what was printed before is kept
    assert job.printed().count("SIGUSR1") == 1
    assert f"job {job.id} goes back into the queue; the run goes on in {tmp_path}/run" in job.printed()
    assert job.printed().count("resumed    after step") == 1
    assert_equal_runs(tmp_path / "run", whole[0])


def test_a_run_that_loses_a_node_goes_on_when_there_is_one_again(cluster, documents, whole, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **CHANGES))
    wait_for_steps(tmp_path / "run", 5, job)
    cluster.lose_node(2)
    wait_until(lambda: job.restarts() == 1, 120, "the job is in the queue again", job)
    cluster.start_node(2)
    assert job.wait(250) == "COMPLETED", job.printed()
    # none of what was done before the last checkpoint is done again
    assert job.printed().count("resumed    after step") == 1
    assert_equal_runs(tmp_path / "run", whole[0])


def test_a_mistake_is_told_and_does_not_come_back(cluster, documents, tmp_path):
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", max_stepz=3))
    assert job.wait(100) == "FAILED"
    assert "error: unknown argument --max_stepz; did you mean --max_steps?" in job.printed()
    assert job.restarts() == 0


def test_a_run_that_somebody_stops_does_not_come_back(cluster, documents, tmp_path):
    endless = CHANGES | {"max_steps": 5000, "eval_every": 5000}
    job = cluster.submit(TRAIN, *flags(documents, tmp_path / "run", **endless))
    wait_for_steps(tmp_path / "run", 2, job)
    (tmp_path / "run" / "stop").touch()
    assert job.wait(60) == "FAILED", job.printed()
    assert job.shown()["ExitCode"] == "75:0"
    assert "the stop file" in job.printed()
    job = cluster.submit(TRAIN, "--resume", tmp_path / "run")
    wait_until(lambda: "resumed    after step" in job.printed(), 100, "it goes on", job)
    job.cancel()
    job.wait(60, "CANCELLED")
    # in which it would have come back
    time.sleep(4)
    assert (job.state(), job.restarts()) == ("CANCELLED", 0), job.printed()


def test_each_task_of_an_array_has_its_own_folder_and_flags(cluster, documents, tmp_path):
    lines = tmp_path / "flags.txt"
    lines.write_text("--seed 7 --max_steps 2\n--seed 8 --max_steps 3\n")
    given = [*flags(documents, tmp_path / "runs", dataloader_num_workers=0), f"@{lines}"]
    job = cluster.submit(TRAIN, *given, options=["--array=1-2", "--nodes=1"])
    wait_until(lambda: cluster.ask("squeue", "-h", "-o", "%i").strip() == "", 200, "the queue is empty", job)
    saved = {number: json.loads((tmp_path / "runs" / number / "config.json").read_text()) for number in "12"}
    assert {number: config["arguments"]["run"]["seed"] for number, config in saved.items()} == {"1": 7, "2": 8}
    assert {number: len(records(tmp_path / "runs" / number, "loss")) for number in "12"} == {"1": 2, "2": 3}
