"""What is measured of training: its steps, and what its loop costs beside bare ones of the same engine."""

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

# kept in memory, and read again and again by both
N_BATCHES = 4


class StepsAlone(Session):
    """Identical to Session except: it neither evaluates nor saves."""

    def evaluate(self) -> bool:
        """Does nothing; training is to go on."""
        return False

    def save(self, figures: dict[str, float]) -> None:
        """Does nothing."""


class LoopSession(StepsAlone):
    """Identical to StepsAlone except: it measures its loop, on batches that it keeps."""

    def measure(self, n_rounds: int) -> LoopCost:
        """Seconds of a step of both loops, each a mean over the `--log_every` steps of a turn; the first is left out.

        Raises:
            ValueError: A step is more than one pass.
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
    """Do the steps of a run, which its log tells of.

    Raises:
        ValueError: Something is wrong with the arguments or the documents.
    """
    with open_session(arguments, environment, StepsAlone) as session:
        session.train()


def measure_loop(arguments: Arguments, environment: Environment, n_rounds: int) -> LoopCost:
    """Measure the loop that a run with these arguments has; all processes call it together, each with its own clock.

    Raises:
        ValueError: Something is wrong with the arguments or the documents, or a step is more than one pass.
    """
    with open_session(arguments, environment, LoopSession) as session:
        return session.measure(n_rounds)


def bare_steps(engine: Any, batches: Iterable[Batch]) -> None:
    """A step for each batch, and nothing else: what a user of DeepSpeed alone would write."""
    for batch in batches:
        output = engine(**batch.model_inputs(engine.device), return_logits=False)
        engine.backward(output.loss)
        engine.step()


def in_turns(contestants: Sequence[Callable[[], None]], device: torch.device) -> Iterator[list[float]]:
    """Seconds that each takes, round after round; who goes first in one goes last in the next."""
    places = list(range(len(contestants)))
    for number in itertools.count():
        order = places[::-1] if number % 2 else places
        seconds = {place: timed(contestants[place], device) for place in order}
        yield [seconds[place] for place in places]
