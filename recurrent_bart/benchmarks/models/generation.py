"""Benchmark of greedy generation. The encoder runs before the measurement starts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkModel, BenchmarkSetting
from recurrent_bart.benchmarks.models.cases import Case
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch
from recurrent_bart.model.flops import Arithmetic

# length of each text in tokens; generation forbids an earlier end-of-sequence token
NEW_TOKENS = 64


def n_context(setting: BenchmarkSetting) -> int:
    """Return the number of positions that decoders attend to: state and last segment of Recurrent BART."""
    return RecurrentBartConfig().pre_seq_len + setting.segment_size


def generator(case: Case, subject: BenchmarkModel, batch: Batch, setting: BenchmarkSetting) -> Callable[[], Tensor]:
    """Return a function that generates greedily by Hugging Face's `generate`, from `n_context` encoder positions."""
    # Any: nn.Module does not declare `generate`
    model: Any = subject.model
    with torch.inference_mode():
        read = subject.encode(batch) if case.model == "ours" else _stand_in(case, setting)
    assert read.last_hidden_state.shape[:2] == (case.batch_size, n_context(setting))
    how = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    return torch.inference_mode()(lambda: model.generate(encoder_outputs=read, **how))


def _stand_in(case: Case, setting: BenchmarkSetting) -> BaseModelOutput:
    shape = case.batch_size, n_context(setting), setting.shape()["d_model"]
    return BaseModelOutput(last_hidden_state=torch.randn(shape, device=setting.device, dtype=setting.dtype))


def generation_flops(case: Case, setting: BenchmarkSetting) -> float:
    """Return the useful FLOPs of generation: one decoder pass over all generated texts."""
    one = Arithmetic(RecurrentBartConfig(**setting.shape()))
    return case.batch_size * one.decoder(torch.tensor([NEW_TOKENS]), torch.tensor([n_context(setting)]))
