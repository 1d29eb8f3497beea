"""Peak memory and speed of forward and backward passes by number of segments."""

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.data.rows import TASKS
from recurrent_bart.modeling_recurrent_bart import CHECKPOINTING_GRAINS, RecurrentBartForConditionalGeneration
from recurrent_bart.monitoring.memory import peak_bytes
from recurrent_bart.training.model_building import SIZES
from recurrent_bart.training.windows import count_windows, window_losses

TARGET_LENGTH = 64
VOCAB_SIZE = 50265


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    task: str
    bptt_depth: int
    checkpointing: str
    schedule: str = "auto"


def all_cases(
    tasks: Iterable[str] = TASKS,
    bptt_depths: Iterable[int] = (0, 2, -1),
    grains: Iterable[str] = CHECKPOINTING_GRAINS,
    schedules: Iterable[str] = ("auto",),
) -> list[Case]:
    """Every way to train that changes memory or speed: target, horizon of gradient, recomputation, schedule."""
    return [Case(*values) for values in itertools.product(tasks, bptt_depths, grains, schedules)]


@dataclass(frozen=True)
class Measurement:
    """What a number of segments costs.

    Attributes:
        n_segments: Segments of each document.
        peak_bytes: Beyond weights and gradients, which do not depend on it.
        seconds: Median of several passes.
        spread: Slowest over fastest of them.
        tokens_per_second: Document tokens, forward and backward.
    """

    n_segments: int
    peak_bytes: int
    seconds: float
    spread: float
    tokens_per_second: float


@dataclass(frozen=True)
class Benchmark:
    """Settings that all cases share.

    Attributes:
        model_size: One of `SIZES`.
        segment_size: Tokens of a segment; None: the size's own.
        batch_size: Documents.
        device: Where to measure.
        dtype: Of the weights.
        n_passes: Timed passes of each; 0: memory alone.
    """

    model_size: str
    segment_size: int | None
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    n_passes: int

    def run(self, case: Case, numbers: Sequence[int]) -> Iterator[Measurement]:
        """Measure a case with each number of segments."""
        torch.manual_seed(0)
        fields = SIZES[self.model_size] | ({"segment_size": self.segment_size} if self.segment_size else {})
        config = RecurrentBartConfig(
            **fields, vocab_size=VOCAB_SIZE, bptt_depth=case.bptt_depth, schedule=case.schedule
        )
        model = RecurrentBartForConditionalGeneration(config).to(self.device, self.dtype).train()
        model.set_gradient_checkpointing(case.checkpointing)
        self._pass(model, self._batch(config, case.task, 1))
        for n_segments in numbers:
            yield self._measure(model, self._batch(config, case.task, n_segments))

    def _measure(self, model: RecurrentBartForConditionalGeneration, batch: Batch) -> Measurement:
        n_bytes = peak_bytes(lambda: self._pass(model, batch), self.device)
        seconds = sorted(self._timed(model, batch) for _ in range(self.n_passes)) or [float("nan")]
        median = statistics.median(seconds)
        return Measurement(
            n_segments=batch.input_ids.shape[1],
            peak_bytes=n_bytes,
            seconds=median,
            spread=seconds[-1] / seconds[0],
            tokens_per_second=batch.n_tokens() / median,
        )

    def _timed(self, model: RecurrentBartForConditionalGeneration, batch: Batch) -> float:
        started = time.perf_counter()
        self._pass(model, batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _pass(self, model: RecurrentBartForConditionalGeneration, batch: Batch) -> None:
        """Forward and backward as the trainer runs them; gradients are there already, and are added to."""
        n_windows = count_windows(batch, model.config)
        for loss in window_losses(model, model.config, batch, self.device, n_windows, batch.n_targets()):
            loss.backward()

    def _batch(self, config: RecurrentBartConfig, task: str, n_segments: int) -> Batch:
        shape = self.batch_size, n_segments
        ids = torch.randint(4, VOCAB_SIZE, (*shape, config.segment_size))
        labels = torch.randint(4, VOCAB_SIZE, (*shape, TARGET_LENGTH))
        if task == "document":
            labels = labels[:, 0]
        return Batch(ids, torch.ones_like(ids), labels, indices=list(range(self.batch_size)))
