"""Environment and srun command of a job's processes, with stand-ins for SLURM's commands; no cluster is needed."""

import os
import signal
import subprocess
import time

import pytest

from launching import TESTS, environment

# `srun` writes its command line and some variables; `python` writes its command line and the environment.
PROGRAMS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "alpha\\nbeta\\n"; else echo "$@" > "$NOTES/requeued"; fi',
    "srun": """
        [[ $* == *--overlap* ]] && exit "${NODES_ANSWER:-0}"
        printf '%s\\n' "$@" > "$NOTES/srun"
        env > "$NOTES/environment"
        trap 'echo USR1 > "$NOTES/signal"' USR1
        [[ -z ${WAITS:-} ]] || { sleep "$WAITS" & while kill -0 $! 2> /dev/null; do wait $!; done; }
        exit "${CODE:-0}" """,
    "python": 'printf "%s\\n" "$@" > "$NOTES/python"; env > "$NOTES/environment"',
}
JOB = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16", "SLURM_JOB_NODELIST": "a,b"}


class Job:
    """Folder of a submission, with what the stand-ins have written."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "slurm").symlink_to(TESTS.parent / "slurm")
        (folder / "bin").mkdir()
        for name, lines in PROGRAMS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
            (folder / "bin" / name).chmod(0o755)

    def start(self, script, *flags, **variables):
        given = {
            name: value
            for name, value in environment().items()
            if not name.startswith(("SLURM", "OMP", "NCCL", "TORCH"))
        }
        given |= {**JOB, "SLURM_SUBMIT_DIR": str(self.folder), "NOTES": str(self.folder), "VIRTUAL_ENV": "tests"}
        given |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{given['PATH']}", **variables}
        command = ["bash", f"slurm/{script}", *map(str, flags)]
        return subprocess.Popen(command, cwd=self.folder, env=given, stdout=subprocess.PIPE, text=True)

    def run(self, script, *flags, **variables):
        """Run a script to its end; return its exit code."""
        started = self.start(script, *flags, **variables)
        started.communicate(timeout=60)
        return started.returncode

    def command(self, program="srun"):
        return (self.folder / program).read_text().splitlines()

    def variables(self):
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def is_requeued(self):
        return (self.folder / "requeued").exists()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize(("rank", "local_rank", "node"), [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)])
def test_each_of_two_processes_of_two_nodes_has_its_rank_and_its_gpu(job, rank, local_rank, node, tmp_path):
    ranks = {"SLURM_PROCID": rank, "SLURM_LOCALID": local_rank, "SLURM_NTASKS": 4, "SLURM_NODEID": node}
    given = {name: str(value) for name, value in ranks.items()} | {"JOB_CACHES": str(tmp_path / "caches")}
    assert job.run("process.sh", "launch/train.py", "--max_steps", 2, **given) == 0
    assert job.command("python") == ["-u", "launch/train.py", "--max_steps", "2"]
    found = job.variables()
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(local_rank), "4")
    # the nodes must not share a Triton cache
    assert found["TRITON_CACHE_DIR"] == f"{tmp_path}/caches/triton-{node}"


RANKS = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(("given", "is_kept"), [("own", True), ("missing", False)])
def test_temporary_files_are_in_the_nodes_folder_if_it_can_be_written(job, tmp_path, given, is_kept):
    (tmp_path / "own").mkdir()
    caches = tmp_path / "caches"
    variables = RANKS | {"JOB_CACHES": str(caches), "TMPDIR": str(tmp_path / given)}
    assert job.run("process.sh", "launch/train.py", **variables) == 0
    assert job.variables()["TMPDIR"] == str(tmp_path / given if is_kept else caches / "tmp")
    assert (caches / "tmp").is_dir() != is_kept
    assert (caches / "triton-0").is_dir()


@pytest.mark.parametrize(("given", "is_kept"), [("own", True), ("missing", False)])
@pytest.mark.parametrize(
    ("script", "folder"),
    [("train", "runs/slurm-42/caches"), ("evaluate", "runs/caches/42"), ("preflight", "runs/caches/42")],
)
def test_caches_are_in_the_folder_of_the_job_and_home_only_if_it_can_be_written(
    job, tmp_path, script, folder, given, is_kept
):
    (tmp_path / "own").mkdir()
    assert job.run(f"{script}.sh", HOME=str(tmp_path / given)) == 0
    found, caches = job.variables(), tmp_path / folder
    assert found["JOB_CACHES"] == str(caches)
    assert found["TORCH_EXTENSIONS_DIR"] == str(caches / "torch_extensions")
    assert found["HOME"] == str(tmp_path / given if is_kept else caches / "home")
    assert (caches / "home").is_dir() != is_kept
    # NCCL prints only failures
    assert found["NCCL_DEBUG"] == "WARN"
    # an error of NCCL reaches the process that tests a node
    assert found.get("TORCH_NCCL_BLOCKING_WAIT") == ("1" if script == "preflight" else None)


@pytest.mark.parametrize(
    ("script", "n_gpus", "n_processes", "n_per_node", "n_cpus"),
    [
        ("train", "8", 16, 8, 2),
        ("train", "0", 2, 1, 16),
        ("train", "32", 64, 32, 1),
        ("evaluate", "2", 4, 2, 8),
        ("preflight", "2", 4, 2, 8),
    ],
)
def test_there_is_one_process_for_each_gpu_with_its_share_of_the_cores(
    job, script, n_gpus, n_processes, n_per_node, n_cpus
):
    assert job.run(f"{script}.sh", SLURM_GPUS_ON_NODE=n_gpus, SLURM_CPUS_PER_GPU="3") == 0
    command, found = job.command(), job.variables()
    assert {
        "--nodes=2",
        f"--ntasks={n_processes}",
        f"--ntasks-per-node={n_per_node}",
        f"--cpus-per-task={n_cpus}",
        # ranks are numbered node by node, and a process sees all GPUs of its node
        "--distribution=block",
        "--gpu-bind=none",
    } <= set(command)
    assert command[command.index("slurm/process.sh") + 1] == f"launch/{script}.py"
    assert found["OMP_NUM_THREADS"] == str(n_cpus)
    # srun refuses this variable together with --cpus-per-task
    assert "SLURM_CPUS_PER_GPU" not in found


@pytest.mark.parametrize(("script", "ends_all"), [("train", "1"), ("evaluate", "1"), ("preflight", "0")])
def test_a_failed_process_ends_all_except_in_the_test_of_nodes(job, script, ends_all):
    assert job.run(f"{script}.sh") == 0
    # the last one holds
    assert [part for part in job.command() if "kill-on" in part][-1] == f"--kill-on-bad-exit={ends_all}"


def test_the_test_of_nodes_is_told_their_names_and_gpus(job):
    assert job.run("preflight.sh", "--wait", 5, SLURM_GPUS_ON_NODE="4") == 0
    command = job.command()
    given = command[command.index("launch/preflight.py") + 1 :]
    assert " ".join(given) == "--folder runs --gpus 4 --per_node 4 --hosts alpha beta --wait 5"


def test_the_threads_that_a_user_sets_hold(job):
    assert job.run("train.sh", OMP_NUM_THREADS="3") == 0
    assert job.variables()["OMP_NUM_THREADS"] == "3"


def test_all_processes_meet_on_the_first_node_of_a_long_list(job):
    # more names than a pipe holds
    (job.folder / "bin" / "scontrol").write_text("#!/usr/bin/env bash\necho alpha\nseq -f node%06g 20000\n")
    assert job.run("train.sh") == 0
    assert job.variables()["MASTER_ADDR"] == "alpha"


def test_jobs_on_one_node_meet_at_ports_of_their_own(job):
    ports = []
    for number in (41, 42, 43, 142, 1_042, 2_042, 10_042, 19_999, 20_000, 123_456_789):
        assert job.run("train.sh", SLURM_JOB_ID=str(number)) == 0
        ports.append(int(job.variables()["MASTER_PORT"]))
    assert len(set(ports)) == len(ports)
    # below the ephemeral ports of Linux, above the ports of system services
    assert all(1024 <= port < 32_768 for port in ports)


@pytest.mark.parametrize(("index", "seed"), [("0", "0"), ("7", "7")])
def test_a_task_of_an_array_has_its_number_as_seed_and_its_own_folder(job, index, seed):
    task = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": index}
    assert job.run("train.sh", "--max_steps", 2, **task) == 0
    command = job.command()
    given = command[command.index("launch/train.py") + 1 :]
    assert given == ["--seed", seed, "--max_steps", "2", "--output_dir", f"runs/slurm-40_{index}"]


def test_a_seed_that_is_given_comes_after_the_tasks_number_and_holds(job):
    task = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    assert job.run("train.sh", "--seed", 11, **task) == 0
    command = job.command()
    assert command[command.index("launch/train.py") + 1 :][:4] == ["--seed", "3", "--seed", "11"]


@pytest.fixture
def crashed(job):
    """Return flags of a resumed run whose folder holds the outcome of an earlier run that was done."""
    (job.folder / "run").mkdir()
    (job.folder / "run" / "outcome.json").write_text('{"code": 0, "reason": "", "step": 9}\n')
    return ["--resume", "run"]


def test_a_crash_is_not_taken_for_the_end_of_an_earlier_run(job, crashed):
    assert job.run("train.sh", *crashed, CODE="137") == 137
    assert not job.is_requeued()


def test_a_crash_with_a_lost_node_goes_back_into_the_queue(job, crashed):
    assert job.run("train.sh", *crashed, CODE="137", NODES_ANSWER="1") == 137
    assert job.command("requeued") == ["requeue 42"]


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_run_that_is_done_or_refused_does_not_go_back_even_without_a_node(job, code):
    assert job.run("train.sh", CODE=code, NODES_ANSWER="1") == int(code)
    assert not job.is_requeued()


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "is_requeued"), [("USR1", True), ("TERM", False)])
def test_before_its_time_is_over_a_job_goes_back_and_a_cancelled_one_does_not(job, name, is_requeued):
    started = job.start("train.sh", WAITS="1", CODE="143", NODES_ANSWER="1" if name == "TERM" else "0")
    wait_for(job.folder / "environment")
    time.sleep(0.2)
    started.send_signal(getattr(signal, f"SIG{name}"))
    started.communicate(timeout=60)
    assert started.returncode == 143
    assert job.is_requeued() == is_requeued
    # srun passes the signal on to all processes
    assert (job.folder / "signal").exists() == (name == "USR1")


@pytest.mark.parametrize(
    ("restarts", "has_begun", "verb"),
    [("0", True, "--output_dir"), ("1", True, "--resume"), ("1", False, "--output_dir"), ("", True, "--output_dir")],
)
def test_a_job_from_the_queue_resumes_the_run_that_it_began(job, restarts, has_begun, verb):
    (job.folder / "run").mkdir()
    if has_begun:
        (job.folder / "run" / "config.json").write_text("{}")
    assert job.run("train.sh", "--output_dir", "run", SLURM_RESTART_COUNT=restarts) == 0
    assert job.command()[-2:] == [verb, "run"]
