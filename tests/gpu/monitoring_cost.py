"""What monitoring costs of a step: `PYTHONPATH=. python tests/gpu/monitoring_cost.py [--model_size base]`.

Trains with and without it, in turn, and prints both medians. Without a GPU it counts the processor's time and not the
clock's, for others may be at work too.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import sum_over_ranks
from recurrent_bart.monitoring.flops import peak_flops
from recurrent_bart.monitoring.rank_figures import Places
from recurrent_bart.monitoring.run_folder import RunFolder
from recurrent_bart.monitoring.timing import Stopwatch
from recurrent_bart.monitoring.tracker import MetricsFile, Trackers
from recurrent_bart.monitoring.wandb_tracker import WandbRun, WandbTracker
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.engine import build_engine
from recurrent_bart.training.environment import place_wandb, start_processes
from recurrent_bart.training.model_building import SIZES
from recurrent_bart.training.optimization import LearningRates, build_optimizer
from recurrent_bart.training.tally import Tally
from recurrent_bart.training.trainer import Trainer

LOG_EVERY = 10
VOCAB_SIZE = 4096


class NoStopwatch(Stopwatch):
    """Times nothing."""

    def measure(self, kind, on_host=False):
        return contextlib.nullcontext()

    def each(self, kind, items):
        return items


class Nothing:
    """Counts nothing."""

    def training(self, *_):
        return 0.0

    def squares(self):
        return math.nan, math.nan


class BareTrainer(Trainer):
    """A loop that logs the loss and the speed."""

    arithmetic = norms = Nothing()

    def log(self):
        tally, self.tally = self.tally, Tally()
        loss, n_targets, _ = sum_over_ranks(
            float(tally.loss), tally.n_targets, tally.n_tokens, device=self.engine.device
        )
        self.on_log({"step": self.state.step, "loss": loss / n_targets})


def make_batch(config, task, n_documents, n_segments):
    ids = torch.randint(4, VOCAB_SIZE, (n_documents, n_segments, config.segment_size))
    labels = torch.randint(4, VOCAB_SIZE, (n_documents, n_segments, 64))
    return Batch(ids, torch.ones_like(ids), labels if task == "sections" else labels[:, 0], indices=[])


def now():
    """Seconds; on a GPU with all work done."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def blocks(trainer):
    """Seconds of a step, mean over the steps between two lines of the log, without end."""
    while True:
        started = now()
        for _ in range(LOG_EVERY):
            trainer.train_step()
        trainer.log()
        yield (now() - started) / LOG_EVERY


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_size", default="tiny", choices=SIZES)
    parser.add_argument("--task", default="document", choices=("document", "sections"))
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=20)
    given = parser.parse_args()
    environment = start_processes(timeout_minutes=10)
    is_bf16 = environment.device.type == "cuda"
    torch.manual_seed(0)
    config = RecurrentBartConfig(**SIZES[given.model_size], vocab_size=VOCAB_SIZE)
    model = RecurrentBartForConditionalGeneration(config).train()
    settings = {
        "train_micro_batch_size_per_gpu": given.documents,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": {"stage": 2},
    }
    engine = build_engine(model, build_optimizer(model, LearningRates(1e-4, 1e-4), 0.01), None, settings)
    batches = itertools.repeat(make_batch(config, given.task, given.documents, given.segments))
    run = RunArguments(max_steps=10**9, eval_every=10**9, log_every=LOG_EVERY, warmup_steps=0)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        place_wandb(folder.path)
        wandb_run = WandbRun("cost", folder.path / "wandb", False, 0, 1, "here", "cost", "cost")
        trackers = Trackers([MetricsFile(folder), WandbTracker(wandb_run, [])])
        common = {"engine": engine, "batches": batches, "run": run, "on_evaluation": lambda: False}
        places = Places.gather(environment.local_rank, peak_flops(environment.device, is_bf16))
        watch = Stopwatch(environment.device)
        full = Trainer(state=TrainerState(), on_log=trackers.log, places=places, watch=watch, **common)
        bare = BareTrainer(state=TrainerState(), on_log=lambda record: None, watch=NoStopwatch(), **common)
        timed = {"with": blocks(full), "without": blocks(bare)}
        seconds = {name: [] for name in timed}
        for number in range(given.blocks + 1):
            # each of the two goes first every other time, and the first round warms up
            for name in list(timed)[:: 1 if number % 2 else -1]:
                value = next(timed[name])
                if number:
                    seconds[name].append(value)
        trackers.finish(True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    device = torch.cuda.get_device_name() if is_bf16 else "processor"
    print(f"{device}, {given.model_size}, {given.task}, {given.documents} documents of {given.segments} segments")
    print(f"a step with monitoring {1e3 * medians['with']:.2f} ms, without {1e3 * medians['without']:.2f} ms")
    print(f"share of it: {100 * (statistics.median(ratios) - 1):.2f} % (median of {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
