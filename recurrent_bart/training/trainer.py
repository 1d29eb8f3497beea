"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from deepspeed import DeepSpeedEngine

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import gather_objects, max_over_ranks, only_first, sum_over_ranks
from recurrent_bart.exposure_bias import Oracle
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.checkpoints import TrainerState
from recurrent_bart.training.windows import count_windows, has_windows, window_losses

# one bad batch is passed over; after so many steps in a row without a finite gradient the weights themselves are bad
MOST_SKIPPED = 10


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


@dataclass
class Trainer:
    """Trains an engine on batches.

    Attributes:
        engine: The sharded model.
        batches: This process's micro-batches, without end.
        run: Its arguments.
        state: Where it stands.
        on_log: Told the figures of a log line, the same on every process.
        on_evaluation: Evaluates, saves, and says whether to stop.
        on_step: Told the number of each step that is done.
        on_skip: Told why a step was not applied, the same on every process.
        oracle: Whose words the decoder reads beside the target's after so many steps, the same on every process.
    """

    engine: DeepSpeedEngine
    batches: Iterator[Batch]
    run: RunArguments
    state: TrainerState
    on_log: Callable[[dict[str, float]], None]
    on_evaluation: Callable[[], bool]
    on_step: Callable[[int], None] = lambda step: None
    on_skip: Callable[[str], None] = lambda reason: None
    oracle: Callable[[int], Oracle | None] = lambda step: None
    tally: Tally = field(default_factory=Tally)

    def train(self) -> None:
        """Train to `--max_steps` or until an evaluation says to stop.

        Raises:
            ValueError: No gradient was finite for many steps.
        """
        if self.state.step == 0 and self.on_evaluation():
            return
        self.tally = Tally()
        while self.state.step < self.run.max_steps:
            self.train_step()
            self.on_step(self.state.step)
            is_last = self.state.step == self.run.max_steps
            evaluates = is_last or self.state.step % self.run.eval_every == 0
            # a tally ends at an evaluation: its time is not counted, and a run resumed there logs the same
            if evaluates or self.state.step % self.run.log_every == 0:
                self.log()
            if evaluates:
                if self.on_evaluation():
                    return
                self.tally = Tally()

    def train_step(self) -> None:
        """One optimizer step over `--gradient_accumulation_steps` micro-batches of every process.

        The loss of each is divided by the number of targets in the whole step, so that every target counts the same
        wherever it stands. Gradients of several passes are reduced once.
        """
        # a sum of its own: the tally's is added to in place
        loss_before, n_targets_before = self.tally.loss + 0.0, self.tally.n_targets
        started = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.run.gradient_accumulation_steps)]
        self.tally.waited_seconds += time.perf_counter() - started
        (n_targets,) = sum_over_ranks(sum(batch.n_targets() for batch in batches), device=self.engine.device)
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
