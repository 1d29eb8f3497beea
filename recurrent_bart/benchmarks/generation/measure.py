"""Measurements of generation: time, memory, equal ids, and the limit that memory bandwidth sets.

Shape suffixes: B documents, A attended length, D model width.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.benchmarks.generation.cases import GenerationCase
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.benchmarks.models.measure import OUT_OF_MEMORY, timed
from recurrent_bart.benchmarks.models.session import Effort
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.monitoring.memory import peak_bytes

GIB = 2**30


@dataclass
class GenerationMeasurement:
    """Result of one case.

    Attributes:
        outcome: "measured", or the reason why the case was not measured.
        call_seconds: Seconds of each timed call of `generate`.
        limit_seconds: Shortest time of the call if each step only moves weights and caches.
        call_bytes: Peak memory of a call, without the weights.
        equal_ids: Share of the ids that are equal to the ids of Hugging Face's eager loop.
    """

    outcome: str = "not measured"
    call_seconds: list[float] = field(default_factory=list)
    limit_seconds: float = 0.0
    call_bytes: int = 0
    equal_ids: float | None = None

    def seconds(self) -> float:
        """Return the median seconds of a call, or nan without timed calls."""
        return statistics.median(self.call_seconds) if self.call_seconds else float("nan")


Results = dict[GenerationCase, GenerationMeasurement]


class GenerationModels:
    """Recurrent BART without recurrence and Hugging Face's BART, with the same decoder."""

    def __init__(self, setting: BenchmarkSetting, **changes: Any):
        torch.manual_seed(0)
        # a short encoder: contexts are random, and no document is read
        fields = setting.shape() | {"encoder_layers": 1, "forced_eos_token_id": None} | changes
        with setting.device:
            ours = RecurrentBartForConditionalGeneration(RecurrentBartConfig(pre_seq_len=0, **fields))
            theirs = BartForConditionalGeneration(BartConfig(**fields))
        theirs.load_state_dict(ours.state_dict())
        self.ours, self.theirs = (model.to(setting.device, setting.dtype).eval() for model in (ours, theirs))
        self.setting, self.d_model = setting, ours.config.d_model

    def generator(self, case: GenerationCase) -> Callable[[], Tensor]:
        """Return a function that generates the texts of a case."""
        # Any: `generate` accepts any encoder's output
        model: Any = self.ours if case.loop == "ours" else self.theirs
        context_BAD = self.context(case)

        def generate() -> Tensor:
            return model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=context_BAD), **case.options())

        return torch.inference_mode()(generate)

    def context(self, case: GenerationCase) -> Tensor:
        """Return the random contexts of a case, `(B, A, D)`."""
        device, shape = self.setting.device, (case.batch_size, case.n_context, self.d_model)
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(shape, generator=generator, device=device, dtype=self.setting.dtype)

    def limit_seconds(self, case: GenerationCase, bytes_per_second: float) -> float:
        """Return the time to read weights and caches once per step and to project the contexts' keys and values once.

        The projection counts by its weights and results only, so the limit stays a lower bound.
        """
        decoder, head = self.theirs.model.decoder, self.theirs.lm_head
        n_bytes = head.weight.element_size()
        n_layers, width = len(decoder.layers), self.d_model
        n_projections = 2 * n_layers * width * (width + 1)
        n_weights = sum(part.numel() for part in decoder.layers.parameters()) - n_projections + head.weight.numel()
        # keys and values of one position in all layers
        position = 2 * n_layers * width
        n_context = case.batch_size * case.n_context * position
        n_own = case.batch_size * case.num_beams * position * (case.new_tokens + 1) / 2
        step = n_weights + n_context + n_own
        return (case.new_tokens * step + n_projections + n_context) * n_bytes / bytes_per_second


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes; the best of several measurements."""
    n_bytes = GIB if device.type == "cuda" else GIB // 16
    source, target = torch.zeros(2, n_bytes, dtype=torch.uint8, device=device)
    return 2 * n_bytes / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def find_wrong_ids(setting: BenchmarkSetting) -> list[str]:
    """Compare both loops in float32 on a small model, greedily and with beams; return one text per difference."""
    sizes = {"vocab_size": 100, "d_model": 32, "decoder_layers": 2, "init_std": 0.3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64}
    small = BenchmarkSetting("tiny", setting.segment_size, setting.device, torch.float32)
    models = GenerationModels(small, **sizes, **heads)
    faults = []
    for num_beams in (1, 4):
        ids = [models.generator(GenerationCase(loop, num_beams, 3, 20, 24))() for loop in ("ours", "eager")]
        if not torch.equal(*ids):
            faults.append(f"generation with num_beams {num_beams}: ids differ from Hugging Face's")
    return faults


def run_cases(
    cases: Sequence[GenerationCase], setting: BenchmarkSetting, effort: Effort, keep: Callable[[Results], None]
) -> Results:
    """Measure all cases; cases of equal sizes alternate. Call `keep` with all results after each measurement."""
    ends = time.monotonic() + effort.budget_seconds
    results: Results = {case: GenerationMeasurement() for case in cases}
    models, speed = GenerationModels(setting), bandwidth(setting.device)
    for group in dict.fromkeys(case.group() for case in cases):
        alike = [case for case in cases if case.group() == group]
        for number in range(effort.n_rounds):
            for case in alike:
                if results[case].outcome != OUT_OF_MEMORY and time.monotonic() < ends:
                    results[case].limit_seconds = models.limit_seconds(case, speed)
                    _measure(case, models, results[case], effort, is_first=number == 0)
                    keep(results)
    return results


def _measure(
    case: GenerationCase, models: GenerationModels, result: GenerationMeasurement, effort: Effort, is_first: bool
) -> None:
    device = models.setting.device
    try:
        generate = models.generator(case)
        if is_first:
            for _ in range(effort.n_warmup):
                generate()
            result.equal_ids = _equal_share(generate(), models, case)
            result.call_bytes = peak_bytes(generate, device)
        result.call_seconds += [timed(generate, device) for _ in range(effort.n_passes)]
        result.outcome = "measured"
    except torch.OutOfMemoryError:
        result.outcome = OUT_OF_MEMORY
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _equal_share(ids: Tensor, models: GenerationModels, case: GenerationCase) -> float:
    """Return the share of ids equal to the eager loop's; an early difference changes all later ids of its text."""
    sizes = case.num_beams, case.batch_size, case.n_context, case.new_tokens
    expected = ids if case.loop == "eager" else models.generator(GenerationCase("eager", *sizes))()
    return float((ids == expected).double().mean()) if ids.shape == expected.shape else 0.0
