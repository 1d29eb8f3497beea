"""Training loop, in three levels: `train`, `train_step`, `forward_backward`."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from deepspeed import DeepSpeedEngine

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.distributed import gather_objects, max_over_ranks, stop_all, sum_over_ranks
from recurrent_bart.model.flops import Arithmetic
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.monitoring.rank_metrics import RankTopology, summarise
from recurrent_bart.monitoring.timing import Stopwatch
from recurrent_bart.monitoring.tracker import known
from recurrent_bart.training.curriculum import Curriculum
from recurrent_bart.training.lifecycle.faults import explain_out_of_memory
from recurrent_bart.training.lifecycle.interruption import Interrupted, Interruption
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.step_metrics import StepMetrics
from recurrent_bart.training.windows import count_windows, has_windows, window_losses
from recurrent_bart.training.zero.engine import reducing_once
from recurrent_bart.training.zero.gradient_norms import GradientNorms


@dataclass
class Trainer:
    """Training loop of an engine.

    Attributes:
        engine: DeepSpeed engine with the sharded model, or an engine with the same methods.
        batches: Micro-batches of this rank, endless.
        run: Arguments of the run.
        state: Trainer state, changed in place.
        on_log: Called with the metrics of a log line, which are equal on every rank.
        on_evaluation: Runs an evaluation; returns True to stop.
        on_save: Writes a checkpoint; called with the counters of `step_metrics`.
        on_step: Called with the number of each finished step.
        on_skip: Called with the reason why a step was not applied, which is equal on every rank.
        oracle: Returns the oracle of scheduled sampling at a step, equal on every rank.
        interruption: Watcher of requests to stop early.
        curriculum: Stages of the document length.
        topology: Hosts and devices of all ranks.
        watch: Timer of the parts of a step.
        step_metrics: Metrics of this rank since the last line of the log.
    """

    engine: DeepSpeedEngine
    batches: Iterator[Batch]
    run: RunArguments
    state: TrainerState
    on_log: Callable[[dict[str, Any]], None]
    on_evaluation: Callable[[], bool]
    on_save: Callable[[dict[str, float]], None] = lambda metrics: None
    on_step: Callable[[int], None] = lambda step: None
    on_skip: Callable[[str], None] = lambda reason: None
    oracle: Callable[[int], Oracle | None] = lambda step: None
    interruption: Interruption = field(default_factory=Interruption)
    curriculum: Curriculum | None = None
    topology: RankTopology = field(default_factory=functools.partial(RankTopology.gather, local_rank=0, peak=math.nan))
    watch: Stopwatch = field(default_factory=Stopwatch)
    step_metrics: StepMetrics = field(default_factory=StepMetrics)

    def train(self) -> None:
        """Train to `--max_steps`, or until an evaluation returns True.

        Raises:
            Interrupted: The run was asked to stop, between two steps or in an evaluation. A checkpoint is written.
            ValueError: No gradient was finite for `--max_skipped_steps` steps in a row.
        """
        try:
            self.run_steps_and_evaluations()
        except Interrupted:
            self.save()
            raise

    def run_steps_and_evaluations(self) -> None:
        """Alternate steps with evaluations, log lines and checkpoints, each at its interval."""
        while True:
            if self.is_evaluation_step() and self.state.evaluated_step != self.state.step and self.evaluate():
                return
            if self.state.step >= self.run.max_steps:
                return
            self.train_step()
            self.on_step(self.state.step)
            # a log line ends at each evaluation: the evaluation's time is not counted, and a resumed run logs the same
            if self.is_logged_at(self.state.step):
                self.log()
            self.advance_curriculum(is_reached=False)
            if self.run.save_every and self.state.step % self.run.save_every == 0 and not self.is_evaluation_step():
                self.save()

    def is_evaluation_step(self) -> bool:
        """Return True if an evaluation follows the step that was made last."""
        return self.is_evaluated_after(self.state.step)

    def is_evaluated_after(self, step: int) -> bool:
        """Return True if step `step` is followed by an evaluation."""
        return step == self.run.max_steps or step % self.run.eval_every == 0

    def is_logged_at(self, step: int) -> bool:
        """Return True if a log line is written after step `step`."""
        return self.is_evaluated_after(step) or step % self.run.log_every == 0

    def evaluate(self) -> bool:
        """Evaluate and write a checkpoint. Return True to stop."""
        stops = self.on_evaluation()
        # set after the evaluation, so that a resumed run repeats an interrupted evaluation
        self.state.evaluated_step = self.state.step
        self.step_metrics = StepMetrics()
        self.save()
        return stops

    def save(self) -> None:
        """Write a checkpoint that includes the metrics counted since the last log line."""
        self.step_metrics.add_seconds(self.watch.seconds())
        self.on_save(self.step_metrics.as_dict())

    def train_step(self) -> None:
        """Run one optimizer step over `--gradient_accumulation_steps` micro-batches of every rank.

        Each loss is divided by the number of targets in the whole step, so that every target token has the same weight.

        Raises:
            Interrupted: The run is asked to stop. The step has then not begun.
        """
        # `+ 0.0` copies the tensor, because the loss of `step_metrics` is changed in place
        loss_before, n_targets_before = self.step_metrics.loss + 0.0, self.step_metrics.n_targets
        with self.watch.measure("data", on_host=True):
            batches = [next(self.batches) for _ in range(self.run.gradient_accumulation_steps)]
        n_targets, *votes = sum_over_ranks(
            sum(batch.n_targets() for batch in batches), *self.interruption.votes(), device=self.engine.device
        )
        self.interruption.obey(votes)
        self.accumulate_gradients(batches, n_targets)
        if self.is_logged_at(self.state.step + 1):
            # read before the step, which advances the learning rate scheduler
            self.step_metrics.learning_rate = self.engine.get_lr()[0]
            self.step_metrics.backbone_square, self.step_metrics.recurrence_square = self.norms.squares()
        # DeepSpeed checks the gradient norm over all ranks, so a step is applied on all ranks or on none
        with self.watch.measure("optimizer"):
            self.engine.step()
        self.state.step += 1
        self.step_metrics.n_steps += 1
        if self.engine.was_step_applied():
            self.state.n_skipped_in_row = 0
        else:
            self.skip()
            self.step_metrics.loss, self.step_metrics.n_targets = loss_before, n_targets_before

    def accumulate_gradients(self, batches: list[Batch], n_targets: float) -> None:
        """Run the passes of all micro-batches, and reduce the sums of their gradients over ranks once."""
        has_several = len(batches) > 1 or has_windows(batches[0], self.config)
        reduces_once = reducing_once(self.engine) if has_several else contextlib.nullcontext()
        with reduces_once:
            for batch in batches:
                with explain_out_of_memory(batch, self.state.step + 1):
                    self.forward_backward(batch, n_targets)

    def advance_curriculum(self, is_reached: bool) -> None:
        """Begin the next stage of the curriculum if the current stage is over. All ranks decide the same."""
        state = self.state
        if self.curriculum and self.curriculum.is_over(state.stage, state.step - state.stage_began, is_reached):
            state.stage, state.stage_began = state.stage + 1, state.step

    def is_reached(self, loss: float, n_steps: float) -> bool:
        """Return True if the loss has reached `--curriculum_loss` within the current stage.

        `loss` is the mean over the last `n_steps` steps.
        """
        threshold = self.run.curriculum_loss
        return threshold is not None and loss <= threshold and n_steps <= self.state.step - self.state.stage_began

    def forward_backward(self, batch: Batch, n_targets: float) -> None:
        """Run the passes of a micro-batch: one forward and one backward pass for each truncated-BPTT window.

        Every rank makes the same number of passes. Each loss is divided by the mean number of targets per rank, because
        DeepSpeed averages gradients over ranks.
        """
        per_process = n_targets / self.engine.world_size
        device = self.engine.device
        n_windows = count_windows(batch, self.config)
        if has_windows(batch, self.config):
            n_windows = max_over_ranks(n_windows, device)
        oracle = self.oracle(self.state.step)
        if oracle is not None and oracle.kind == "sentence":
            oracle = replace(oracle, n_steps=max_over_ranks(batch.labels.shape[-1], device))
        settings = oracle, self.run.label_smoothing_factor
        losses = window_losses(self.engine, self.config, batch, device, n_windows, per_process, *settings)
        for loss in self.watch.each("forward", losses):
            with self.watch.measure("backward"):
                self.engine.backward(loss)
            self.step_metrics.loss += loss.detach() * per_process
        self.step_metrics.add(batch, self.arithmetic.training(batch.attention_mask, batch.labels))

    @property
    def config(self) -> RecurrentBartConfig:
        """Configuration of the model."""
        return self.engine.module.config

    @functools.cached_property
    def norms(self) -> GradientNorms:
        """Gradient norms of BART's parameters and of the recurrence."""
        return GradientNorms(self.engine)

    @functools.cached_property
    def arithmetic(self) -> Arithmetic:
        """Counter of useful floating-point operations."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.engine.module.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        return Arithmetic(self.config, trained / sum(size for size, _ in sizes))

    def skip(self) -> None:
        """Count a step that was not applied, and report the ranks that caused it. Stop after too many in a row."""
        is_finite = gather_objects(math.isfinite(float(self.step_metrics.loss)))
        ranks = [str(rank) for rank, finite in enumerate(is_finite) if not finite]
        what = (
            f"loss was not finite on rank {', '.join(ranks)}"
            if ranks
            else "gradient was not finite, but every loss was"
        )
        self.state.n_skipped += 1
        self.state.n_skipped_in_row += 1
        self.on_skip(f"step {self.state.step} is skipped: the {what}")
        if self.state.n_skipped_in_row >= self.run.max_skipped_steps:
            self.stop_after_skips()

    def stop_after_skips(self) -> None:
        """Save a checkpoint, whose weights the skipped steps have not changed, then stop."""
        n_steps, self.state.n_skipped_in_row = self.state.n_skipped_in_row, 0
        self.save()
        message = (
            f"step {self.state.step}: no finite gradient in {n_steps} steps, which left the weights unchanged; "
            "lower --learning_rate or raise --warmup_steps, then continue with --resume or start a new run"
        )
        stop_all(message)

    def log(self) -> None:
        """Combine the metrics of all ranks since the last log line, and call `on_log` with the result."""
        metrics, self.step_metrics = self.step_metrics, StepMetrics()
        metrics.add_seconds(self.watch.seconds())
        metrics.read_memory(self.engine.device)
        metrics.seconds = time.perf_counter() - metrics.started
        ranks = metrics.of_all_ranks(self.engine.device)
        record = {
            "step": self.state.step,
            **summarise(ranks, self.topology, int(metrics.n_steps)),
            "learning_rate": metrics.learning_rate,
            "gradient_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "seconds_left": (self.run.max_steps - self.state.step) * ranks[0].seconds / metrics.n_steps,
            "n_skipped": self.state.n_skipped,
        }
        oracle = self.oracle(self.state.step - 1)
        if oracle is not None:
            record["gold_probability"] = oracle.gold_probability
        if self.curriculum is not None:
            record["curriculum_segments"] = self.curriculum.longest(self.state.stage)
            self.advance_curriculum(is_reached=self.is_reached(record["loss"], metrics.n_steps))
        self.on_log(known(record))
