"""Code that each process of the training benchmark runs.

One part times the steps of a run. The other part compares the training loop with bare steps, which are DeepSpeed engine
steps without metrics, logging and checks.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from recurrent_bart.benchmarks.models.measure import timed
from recurrent_bart.benchmarks.training.results import LoopCost
from recurrent_bart.data.batches import Batch
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.experiment import open_session
from recurrent_bart.training.session import Session
from recurrent_bart.training.training_batches import TrainingBatches
from recurrent_bart.training.windows import has_windows

# number of batches that the training loop and the bare steps repeat
N_BATCHES = 4


class StepsAlone(Session):
    """Session that runs no evaluation and saves no checkpoint."""

    def evaluate(self) -> bool:
        """Return False without an evaluation, so training continues."""
        return False

    def save(self, metrics: dict[str, float]) -> None:
        """Do nothing."""


class LoopSession(StepsAlone):
    """Session that times its training loop and bare steps in turn, on batches held in memory."""

    def measure(self, n_rounds: int) -> LoopCost:
        """Time the training loop and bare steps in `n_rounds` rounds, after one warm-up round.

        A round has `--log_every` steps of each, and its result is the mean time of a step.

        Raises:
            ValueError: A training step has several forward and backward passes.
        """
        run, engine = self.arguments.run, self.engine
        batches = self._read()
        if run.gradient_accumulation_steps > 1 or has_windows(batches[0], engine.module.config):
            raise ValueError(
                "--parts loop: a step must have one forward and one backward pass; remove "
                "--gradient_accumulation_steps and --task sections"
            )
        trainer = self._trainer(itertools.cycle(batches))
        for_bare = itertools.cycle(batches)

        def train() -> None:
            run.max_steps = self.state.step + run.log_every
            trainer.run_steps_and_evaluations()

        def train_bare() -> None:
            bare_steps(engine, itertools.islice(for_bare, run.log_every))

        with self.interruption.watching(), self.stall_watch:
            rounds = list(itertools.islice(in_turns([train, train_bare], engine.device), n_rounds + 1))
        seconds = [[turn / run.log_every for turn in turns] for turns in zip(*rounds[1:], strict=True)]
        return LoopCost("measured", trainer_seconds=seconds[0], bare_seconds=seconds[1])

    def _read(self) -> list[Batch]:
        read = TrainingBatches(
            self.prepared.splits["train"], self.order, self.arguments.run, self.environment, self.state
        )
        batches = list(itertools.islice(read, N_BATCHES))
        read.close()
        return batches


def run_steps(arguments: Arguments, environment: Environment) -> None:
    """Train as `launch/train.py` does, but without evaluations and checkpoints."""
    with open_session(arguments, environment, StepsAlone) as session:
        session.train()


def measure_loop(arguments: Arguments, environment: Environment, n_rounds: int) -> LoopCost:
    """Compare the training loop with bare steps. All processes must call this function together."""
    with open_session(arguments, environment, LoopSession) as session:
        return session.measure(n_rounds)


def bare_steps(engine: Any, batches: Iterable[Batch]) -> None:
    """Run one DeepSpeed engine step per batch, and nothing else. A plain DeepSpeed user would write this code."""
    for batch in batches:
        output = engine(**batch.model_inputs(engine.device), return_logits=False)
        engine.backward(output.loss)
        engine.step()


def in_turns(contestants: Sequence[Callable[[], None]], device: torch.device) -> Iterator[list[float]]:
    """Yield the seconds of each function in `contestants`, once per round. Each round reverses the order of calls."""
    places = list(range(len(contestants)))
    for number in itertools.count():
        order = places[::-1] if number % 2 else places
        seconds = {place: timed(contestants[place], device) for place in order}
        yield [seconds[place] for place in places]
