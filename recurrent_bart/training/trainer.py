"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from deepspeed import DeepSpeedEngine

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import gather_objects, max_over_ranks, only_first, sum_over_ranks
from recurrent_bart.exposure_bias import Oracle
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.checkpoints import TrainerState
from recurrent_bart.training.interruption import Interrupted, Interruption
from recurrent_bart.training.windows import count_windows, has_windows, window_losses

# one bad batch is passed over; after so many steps in a row without a finite gradient the weights themselves are bad
MOST_SKIPPED = 10
# what of a tally is counted and so can be gone on from
COUNTED = ("loss", "n_targets", "n_tokens", "n_steps", "waited_seconds")


@dataclass
class Tally:
    """What has happened since the last line of the log, on this process."""

    loss: float = 0.0
    n_targets: int = 0
    n_tokens: int = 0
    n_steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    waited_seconds: float = 0.0
    learning_rate: float = 0.0

    def figures(self) -> dict[str, float]:
        """What a checkpoint keeps, for a line of the log that ends after it."""
        kept = {name: float(getattr(self, name)) for name in COUNTED}
        return {**kept, "seconds": time.perf_counter() - self.started}

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> "Tally":
        """Go on from those of a checkpoint; without any, from nothing."""
        tally = cls(started=time.perf_counter() - figures.get("seconds", 0.0))
        for name in COUNTED:
            setattr(tally, name, figures.get(name, 0.0))
        return tally


@dataclass
class Trainer:
    """Trains an engine on batches.

    Attributes:
        engine: The sharded model.
        batches: This process's micro-batches, without end.
        run: Its arguments.
        state: Where it stands.
        on_log: Told the figures of a log line, the same on every process.
        on_evaluation: Evaluates and says whether to stop.
        on_save: Writes a checkpoint, which keeps the figures of the tally too.
        on_step: Told the number of each step that is done.
        on_skip: Told why a step was not applied, the same on every process.
        oracle: Whose words the decoder reads beside the target's after so many steps, the same on every process.
        interruption: What may ask the run to stop before its end.
    """

    engine: DeepSpeedEngine
    batches: Iterator[Batch]
    run: RunArguments
    state: TrainerState
    on_log: Callable[[dict[str, float]], None]
    on_evaluation: Callable[[], bool]
    on_save: Callable[[dict[str, float]], None] = lambda figures: None
    on_step: Callable[[int], None] = lambda step: None
    on_skip: Callable[[str], None] = lambda reason: None
    oracle: Callable[[int], Oracle | None] = lambda step: None
    interruption: Interruption = field(default_factory=Interruption)
    tally: Tally = field(default_factory=Tally)

    def train(self) -> None:
        """Train to `--max_steps` or until an evaluation says to stop.

        Raises:
            Interrupted: It was asked to stop, between two steps or in an evaluation; a checkpoint is written.
            ValueError: No gradient was finite for many steps.
        """
        try:
            self.train_to_the_end()
        except Interrupted:
            self.on_save(self.tally.figures())
            raise

    def train_to_the_end(self) -> None:
        """Steps and evaluations, each at its interval."""
        while True:
            if self.is_evaluated_here() and self.state.evaluated_step != self.state.step and self.evaluate():
                return
            if self.state.step >= self.run.max_steps:
                return
            self.train_step()
            self.on_step(self.state.step)
            # a tally ends at an evaluation: its time is not counted, and a run resumed there logs the same
            if self.is_evaluated_here() or self.state.step % self.run.log_every == 0:
                self.log()
            if self.run.save_every and self.state.step % self.run.save_every == 0 and not self.is_evaluated_here():
                self.on_save(self.tally.figures())

    def is_evaluated_here(self) -> bool:
        """Whether an evaluation belongs after the steps done so far."""
        return self.state.step == self.run.max_steps or self.state.step % self.run.eval_every == 0

    def evaluate(self) -> bool:
        """Evaluate and write a checkpoint; says whether to stop."""
        stops = self.on_evaluation()
        # one that is interrupted is made by the run that goes on
        self.state.evaluated_step = self.state.step
        self.tally = Tally()
        self.on_save(self.tally.figures())
        return stops

    def train_step(self) -> None:
        """One optimizer step over `--gradient_accumulation_steps` micro-batches of every process.

        The loss of each is divided by the number of targets in the whole step, so that every target counts the same
        wherever it stands. Gradients of several passes are reduced once.

        Raises:
            Interrupted: The run is asked to stop. The step has not begun then.
        """
        # a sum of its own: the tally's is added to in place
        loss_before, n_targets_before = self.tally.loss + 0.0, self.tally.n_targets
        started = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.run.gradient_accumulation_steps)]
        self.tally.waited_seconds += time.perf_counter() - started
        n_targets, *votes = sum_over_ranks(
            sum(batch.n_targets() for batch in batches), *self.interruption.votes(), device=self.engine.device
        )
        self.interruption.obey(votes)
        has_several = len(batches) > 1 or has_windows(batches[0], self.config)
        reduces_once = self.engine.coalesce_grad_reduction() if has_several else contextlib.nullcontext()
        with reduces_once:
            for batch in batches:
                self.forward_backward(batch, n_targets)
        # the step moves it on to the next one's
        self.tally.learning_rate = self.engine.get_lr()[0]
        # applied on all processes or on none: DeepSpeed looks at the norm of the whole gradient
        self.engine.step()
        self.state.step += 1
        self.tally.n_steps += 1
        if self.engine.was_step_applied():
            self.state.n_skipped_in_row = 0
        else:
            self.skip()
            self.tally.loss, self.tally.n_targets = loss_before, n_targets_before

    def forward_backward(self, batch: Batch, n_targets: float) -> None:
        """Add a micro-batch's gradient, window after window, in as many passes on every process.

        DeepSpeed averages gradients over processes, which sums them once each is divided by the targets per process.
        """
        per_process = n_targets / self.engine.world_size
        device = self.engine.device
        n_windows = count_windows(batch, self.config)
        if has_windows(batch, self.config):
            n_windows = max_over_ranks(n_windows, device)
        oracle = self.oracle(self.state.step)
        if oracle is not None and oracle.kind == "sentence":
            oracle = replace(oracle, n_steps=max_over_ranks(batch.labels.shape[-1], device))
        for loss in window_losses(self.engine, self.config, batch, device, n_windows, per_process, oracle):
            self.engine.backward(loss)
            self.tally.loss += loss.detach() * per_process
        self.tally.n_targets += batch.n_targets()
        self.tally.n_tokens += batch.n_tokens()

    @property
    def config(self) -> RecurrentBartConfig:
        """The model's architecture."""
        return self.engine.module.config

    def skip(self) -> None:
        """Count a step that was not applied and find the processes that caused it.

        Raises:
            ValueError: It is one of many in a row.
        """
        is_finite = gather_objects(math.isfinite(float(self.tally.loss)))
        ranks = [str(rank) for rank, finite in enumerate(is_finite) if not finite]
        what = f"loss was not finite on rank {', '.join(ranks)}" if ranks else "gradient was not finite, every loss was"
        self.state.n_skipped += 1
        self.state.n_skipped_in_row += 1
        self.on_skip(f"step {self.state.step} is skipped: the {what}")
        if self.state.n_skipped_in_row >= MOST_SKIPPED:
            only_first(self._give_up)

    def _give_up(self) -> None:
        raise ValueError(
            f"step {self.state.step}: no finite gradient in {MOST_SKIPPED} steps; lower --learning_rate, "
            "or raise --warmup_steps; --resume goes on from the last checkpoint"
        )

    def log(self) -> None:
        """Sum up the steps since the last line, over all processes."""
        tally, self.tally = self.tally, Tally()
        loss, n_targets, n_tokens = sum_over_ranks(
            float(tally.loss), tally.n_targets, tally.n_tokens, device=self.engine.device
        )
        seconds = time.perf_counter() - tally.started
        step_seconds = seconds / tally.n_steps
        record = {
            "step": self.state.step,
            # all steps may have been skipped
            "loss": loss / n_targets if n_targets else math.nan,
            "learning_rate": tally.learning_rate,
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "tokens_per_second": n_tokens / seconds,
            "step_seconds": step_seconds,
            "waited_share": tally.waited_seconds / seconds,
            "seconds_left": (self.run.max_steps - self.state.step) * step_seconds,
            "n_skipped": self.state.n_skipped,
        }
        oracle = self.oracle(self.state.step - 1)
        if oracle is not None:
            record["gold_probability"] = oracle.gold_probability
        # a file of JSON has no word for the others
        self.on_log({name: value for name, value in record.items() if math.isfinite(value)})
