"""Training benchmark in one process: steps of a run, and the training loop compared with bare engine steps."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from recurrent_bart.benchmarks.models.measure import timed
from recurrent_bart.benchmarks.training.results import LoopCost
from recurrent_bart.data.batches import Batch
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.session import Session, open_session
from recurrent_bart.training.training_batches import TrainingBatches
from recurrent_bart.training.windows import has_windows

# batches that both loops repeat
N_BATCHES = 4


class StepsAlone(Session):
    """Identical to Session except: it neither evaluates nor saves."""

    def evaluate(self) -> bool:
        """Do nothing; return False, so training continues."""
        return False

    def save(self, figures: dict[str, float]) -> None:
        """Do nothing."""


class LoopSession(StepsAlone):
    """Identical to StepsAlone except: it measures its loop, on batches held in memory."""

    def measure(self, n_rounds: int) -> LoopCost:
        """Return the step times of both loops, means over `--log_every` steps; the first round is a warm-up.

        Raises:
            ValueError: A step has several passes.
        """
        run, engine = self.arguments.run, self.engine
        batches = self._read()
        if run.gradient_accumulation_steps > 1 or has_windows(batches[0], engine.module.config):
            raise ValueError("a bare step is one forward and backward pass: no accumulation, no target per segment")
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
    """Train as `launch/train.py`, without evaluations and checkpoints."""
    with open_session(arguments, environment, StepsAlone) as session:
        session.train()


def measure_loop(arguments: Arguments, environment: Environment, n_rounds: int) -> LoopCost:
    """Measure the training loop with these arguments. All processes call it together; each measures its own time."""
    with open_session(arguments, environment, LoopSession) as session:
        return session.measure(n_rounds)


def bare_steps(engine: Any, batches: Iterable[Batch]) -> None:
    """Run one engine step per batch and nothing else: the code of a plain DeepSpeed user."""
    for batch in batches:
        output = engine(**batch.model_inputs(engine.device), return_logits=False)
        engine.backward(output.loss)
        engine.step()


def in_turns(contestants: Sequence[Callable[[], None]], device: torch.device) -> Iterator[list[float]]:
    """Yield the seconds of each contestant, round after round; the order reverses in each round."""
    places = list(range(len(contestants)))
    for number in itertools.count():
        order = places[::-1] if number % 2 else places
        seconds = {place: timed(contestants[place], device) for place in order}
        yield [seconds[place] for place in places]
