"""Measurement of one case: time, memory and FLOPs."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkModel, BenchmarkSetting, build_benchmark_model
from recurrent_bart.benchmarks.models.captured import CapturedStep, captured_reading
from recurrent_bart.benchmarks.models.cases import Case
from recurrent_bart.benchmarks.models.generation import NEW_TOKENS, generation_flops, generator
from recurrent_bart.data.batches import Batch
from recurrent_bart.monitoring.memory import peak_bytes

TARGET_LENGTH = 64
OUT_OF_MEMORY = "out of memory"


@dataclass
class Measurement:
    """Result of one case, collected over one or several measurements.

    Attributes:
        outcome: "measured", or the reason why the case was not measured.
        step_seconds: Seconds of each timed step.
        n_tokens: Number of document tokens in a step. For generation, number of generated tokens.
        flops: Useful FLOPs of a step.
        resident_bytes: Memory that stays allocated between steps: weights, optimizer state, gradients if kept.
        step_bytes: Peak memory of a step beyond `resident_bytes`.
        matrix_peak: FLOP/s of a large matrix product, measured by the same process.
    """

    outcome: str = "not measured"
    step_seconds: list[float] = field(default_factory=list)
    n_tokens: int = 0
    flops: float = 0.0
    resident_bytes: int = 0
    step_bytes: int = 0
    matrix_peak: float = 0.0

    def seconds(self) -> float:
        """Return the median seconds of a step, or nan without timed steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else float("nan")

    def spread(self) -> float:
        """Return the time of the slowest step divided by the time of the fastest step."""
        return max(self.step_seconds) / min(self.step_seconds) if self.step_seconds else float("nan")

    def tokens_per_second(self) -> float:
        """Return `n_tokens` per second."""
        return self.n_tokens / self.seconds()

    def share_of_peak(self) -> float:
        """Return useful FLOP/s as a share of `matrix_peak`."""
        return self.flops / self.seconds() / self.matrix_peak

    def peak_bytes(self) -> int:
        """Return the peak memory of the case in bytes."""
        return self.resident_bytes + self.step_bytes


def measure(case: Case, setting: BenchmarkSetting, measurement: Measurement, n_warmup: int, n_passes: int) -> None:
    """Build the model of a case, run it, and add the results to `measurement`.

    Only the first call for a case measures memory. With `n_passes` 0, the call times no step.
    """
    try:
        _measure(case, setting, measurement, n_warmup, n_passes)
        measurement.outcome = "measured"
    except torch.OutOfMemoryError:
        measurement.outcome = OUT_OF_MEMORY
    # stack frames of the exception may hold tensors until now
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(case: Case, setting: BenchmarkSetting, measurement: Measurement, n_warmup: int, n_passes: int) -> None:
    torch.manual_seed(0)
    device = setting.device
    resident_before = _device_bytes(device) if device.type == "cuda" else 0
    subject = build_benchmark_model(case, setting)
    batch = random_batch(case, setting)
    step = work_of(case, subject, batch, setting)
    for _ in range(n_warmup):
        step()
    if not measurement.step_bytes:
        measurement.resident_bytes = _resident_bytes(subject, step, device) - resident_before
        measurement.step_bytes = peak_bytes(step, device)
        measurement.n_tokens = case.batch_size * NEW_TOKENS if case.work == "generation" else batch.n_tokens()
        measurement.flops = _flops(case, subject, batch, setting)
    measurement.step_seconds += [timed(step, device) for _ in range(n_passes)]


def _flops(case: Case, subject: BenchmarkModel, batch: Batch, setting: BenchmarkSetting) -> float:
    if case.work == "generation":
        return generation_flops(case, setting)
    return subject.encoder_flops(batch) if case.work == "inference" else subject.training_flops(batch)


def random_batch(case: Case, setting: BenchmarkSetting) -> Batch:
    """Return a batch of random documents without padding."""
    shape, n_ids = (case.batch_size, case.n_segments), setting.vocab_size()
    ids = torch.randint(4, n_ids, (*shape, setting.segment_size))
    labels = torch.randint(4, n_ids, (*shape, TARGET_LENGTH))
    if case.task == "document":
        # Hugging Face's losses need contiguous labels
        labels = labels[:, 0].contiguous()
    return Batch(ids, torch.ones_like(ids), labels, indices=list(range(case.batch_size)))


class Step:
    """Training step of a case. Without an optimizer, gradients are never freed, and each step adds to the gradients."""

    def __init__(self, subject: BenchmarkModel, batch: Batch, with_optimizer: bool):
        self.subject, self.batch = subject, batch
        parameters = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if with_optimizer else None

    def __call__(self) -> None:
        """Run one training step."""
        for loss in self.subject.losses(self.batch):
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def work_of(case: Case, subject: BenchmarkModel, batch: Batch, setting: BenchmarkSetting) -> Callable[[], object]:
    """Return the function that does the work of the case, for timing."""
    if case.work == "generation":
        return generator(case, subject, batch, setting)
    is_trained = case.work == "training"
    if case.graphed and case.work == "inference":
        return captured_reading(subject, batch)
    if case.graphed:
        return CapturedStep(subject, batch, is_trained)
    if case.work == "inference":
        return torch.inference_mode()(lambda: subject.encode(batch))
    return Step(subject, batch, is_trained)


def _resident_bytes(subject: BenchmarkModel, step: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return _device_bytes(device)
    parameters = list(subject.model.parameters())
    tensors = parameters + [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer = getattr(step, "optimizer", None)
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _device_bytes(device: torch.device) -> int:
    """Return the bytes of tensors and of the memory pools of CUDA graphs.

    A pool counts as a whole, because tensors outside the graph cannot use its free part.
    """
    segments = torch.cuda.memory_snapshot()
    number = torch.cuda.current_device() if device.index is None else device.index
    recorded = [it for it in segments if it["device"] == number and tuple(it["segment_pool_id"]) != (0, 0)]
    unused = sum(segment["total_size"] - segment["allocated_size"] for segment in recorded)
    return torch.cuda.memory_allocated(device) + unused


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the duration of one step in seconds, until the GPU has finished all its kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product. This is the best of several measurements."""
    size, n_products = (8192, 10) if device.type == "cuda" else (1024, 1)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    out = left @ right

    def products() -> None:
        for _ in range(n_products):
            torch.mm(left, right, out=out)

    return 2 * size**3 * n_products / min(timed(products, device) for _ in range(5))
