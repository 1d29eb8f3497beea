"""`make chaos`: a run that is killed repeatedly ends bit-identical to an uninterrupted run.

SIGKILL ends all processes at once, at moments drawn from a seed: during startup, between steps, and while a checkpoint
is written. The run is resumed each time. It takes minutes, so it is not part of the test suite.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launching
from recurrent_bart.run_folder import RunFolder
from runs import flags, write_documents
from saved_tensors import differing, saved_tensors

TRAIN = launching.TESTS.parent / "launch" / "train.py"
# timeout of each wait
PATIENCE_SECONDS = 300
MOMENTS = ("while saving", "after a step", "while starting")
SHARES = (5, 4, 1)


class Run:
    """Processes of one run, started directly: the workers of a launcher would outlive it."""

    def __init__(self, argv, n_processes):
        port = str(launching.free_port())
        common = {"WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # closed with the run
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(TRAIN), *argv],
                cwd=launching.TESTS.parent,
                env=launching.environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
                stdout=self.log,
                stderr=subprocess.STDOUT,
                # a process group with the data workers
                start_new_session=True,
            )
            for rank in range(n_processes)
        ]

    def is_over(self):
        return all(process.poll() is not None for process in self.processes)

    def kill(self):
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def finish(self):
        """Wait until all processes end, and check that they succeed."""
        try:
            codes = [process.wait(timeout=PATIENCE_SECONDS) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            codes = None
        if codes is None or any(codes):
            self.log.seek(0)
            raise SystemExit(f"a run ended with {codes or 'no end'}:\n{self.log.read()[-4000:]}")


def wait_until(condition, run):
    """Wait for a condition; return False if the run ends before it holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if run.is_over():
            return False
        if time.monotonic() > deadline:
            run.kill()
            raise SystemExit("a run stands still")
        time.sleep(0.002)
    return True


def last_step(folder):
    return max((record["step"] for record in RunFolder(folder).read_metrics()), default=0)


def is_saving(folder):
    return next((folder / "checkpoints").glob(".step-*.tmp"), None) is not None


def kill_once(run, folder, moment, step, choice):
    """Kill a run at a moment after step `step`; return True if it was still running."""
    if moment == "while starting":
        time.sleep(choice.uniform(0, 8))
    elif not wait_until(lambda: last_step(folder) >= step, run):
        return False
    elif moment == "while saving":
        wait_until(lambda: is_saving(folder), run)
        time.sleep(choice.uniform(0, 0.05))
    else:
        time.sleep(choice.uniform(0, 0.3))
    was_there = not run.is_over()
    run.kill() if was_there else run.finish()
    return was_there


def train_with_kills(begin, folder, n_processes, n_kills, max_steps, choice):
    """Kill and resume a run until it is done; return the number of kills, and of kills during a save."""
    steps = sorted(choice.sample(range(1, max_steps - 1), n_kills))
    n_killed = n_saving = 0
    for step, moment in zip(steps, choice.choices(MOMENTS, SHARES, k=n_kills), strict=True):
        run = Run(resume_or(begin, folder), n_processes)
        if not kill_once(run, folder, moment, step, choice):
            break
        n_killed += 1
        n_saving += is_saving(folder)
        checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        print(f"killed {n_killed:2d}: {moment}, after step {last_step(folder)}; {checkpoints}", flush=True)
    Run(resume_or(begin, folder), n_processes).finish()
    return n_killed, n_saving


def resume_or(begin, folder):
    """Return the command line that resumes a run; a run killed before it wrote its configuration begins anew."""
    return ["--resume", str(folder)] if (folder / "config.json").exists() else begin


def logged_losses(folder):
    names = ("loss", "validation_loss")
    return [(r["step"], *map(r.get, names)) for r in RunFolder(folder).read_metrics() if any(n in r for n in names)]


def main():
    """Run both, compare them and print a report."""
    parser = argparse.ArgumentParser(description="Kill a run again and again.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--n_processes", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async_save", action="store_true")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    changes = {
        "deepspeed": f"ds_configs/zero{options.stage}.json",
        "max_steps": options.max_steps,
        "eval_every": max(1, options.max_steps // 4),
        "save_every": 2,
        "log_every": 1,
        "dropout": 0.1,
        "hidden_dropout_prob": 0.1,
        "dataloader_num_workers": 1,
        "async_save": options.async_save,
    }
    documents = write_documents(place)
    started = time.perf_counter()
    Run(flags(documents, place / "whole", **changes), options.n_processes).finish()
    print(f"the run that is left alone: {time.perf_counter() - started:.0f} s", flush=True)
    n_killed, n_saving = train_with_kills(
        flags(documents, place / "killed", **changes),
        place / "killed",
        options.n_processes,
        options.kills,
        options.max_steps,
        random.Random(options.seed),
    )
    last = Path("checkpoints") / f"step-{options.max_steps:08d}"
    found, expected = (saved_tensors(place / name / last) for name in ("killed", "whole"))
    different = differing(found, expected)
    logs_differ = logged_losses(place / "killed") != logged_losses(place / "whole")
    print(
        f"killed {n_killed} times, {n_saving} of them with a checkpoint half written; "
        f"{len(different)} of {len(expected)} tensors differ after step {options.max_steps}, "
        f"the logged losses {'differ' if logs_differ else 'are equal'}; {time.perf_counter() - started:.0f} s"
    )
    if different or logs_differ or n_killed < options.kills:
        raise SystemExit(f"both runs are left in {place}; first tensor that differs: {different[:1]}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
