"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from deepspeed import DeepSpeedEngine

from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import sum_over_ranks
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.checkpoints import TrainerState


@dataclass
class Window:
    """What has happened since the last line of the log, on this process."""

    loss: float = 0.0
    n_targets: int = 0
    n_tokens: int = 0
    n_steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    waited_seconds: float = 0.0


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
    """

    engine: DeepSpeedEngine
    batches: Iterator[Batch]
    run: RunArguments
    state: TrainerState
    on_log: Callable[[dict[str, float]], None]
    on_evaluation: Callable[[], bool]
    window: Window = field(default_factory=Window)

    def train(self) -> None:
        """Train to `--max_steps` or until an evaluation says to stop."""
        if self.state.step == 0 and self.on_evaluation():
            return
        self.window = Window()
        while self.state.step < self.run.max_steps:
            self.train_step()
            is_last = self.state.step == self.run.max_steps
            if is_last or self.state.step % self.run.log_every == 0:
                self.log()
            if is_last or self.state.step % self.run.eval_every == 0:
                stops = self.on_evaluation()
                self.window = Window()
                if stops:
                    return

    def train_step(self) -> None:
        """One optimizer step over `--gradient_accumulation_steps` micro-batches of every process.

        The loss of each is divided by the number of targets in the whole step, so that every target counts the same
        wherever it stands. Gradients of several passes are reduced once.
        """
        started = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.run.gradient_accumulation_steps)]
        self.window.waited_seconds += time.perf_counter() - started
        (n_targets,) = sum_over_ranks(sum(batch.n_targets() for batch in batches), device=self.engine.device)
        reduces_once = self.engine.coalesce_grad_reduction() if len(batches) > 1 else contextlib.nullcontext()
        with reduces_once:
            for batch in batches:
                self.forward_backward(batch, n_targets)
        self.engine.step()
        self.state.step += 1
        self.state.n_skipped += not self.engine.was_step_applied()
        self.window.n_steps += 1

    def forward_backward(self, batch: Batch, n_targets: float) -> None:
        """Add a micro-batch's gradient.

        DeepSpeed averages gradients over processes, which sums them once each is divided by the targets per process.
        """
        loss = self.engine(
            **batch.model_inputs(self.engine.device), num_items_in_batch=n_targets / self.engine.world_size
        ).loss
        self.engine.backward(loss)
        self.window.loss += loss.detach() * n_targets / self.engine.world_size
        self.window.n_targets += batch.n_targets()
        self.window.n_tokens += batch.n_tokens()

    def log(self) -> None:
        """Sum up the steps since the last line, over all processes."""
        window, self.window = self.window, Window()
        loss, n_targets, n_tokens = sum_over_ranks(
            float(window.loss), window.n_targets, window.n_tokens, device=self.engine.device
        )
        seconds = time.perf_counter() - window.started
        step_seconds = seconds / window.n_steps
        self.on_log(
            {
                "step": self.state.step,
                "loss": loss / n_targets,
                "learning_rate": self.engine.get_lr()[0],
                "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
                "tokens_per_second": n_tokens / seconds,
                "step_seconds": step_seconds,
                "waited_share": window.waited_seconds / seconds,
                "seconds_left": (self.run.max_steps - self.state.step) * step_seconds,
                "n_skipped": self.state.n_skipped,
            }
        )
