"""A step by kernels gives Hugging Face's ids, in Triton's interpreter."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from generation_options import count_loops, documents, generate, random_case
from recurrent_bart.model.decoding import cached_decoder, fused_layer
from recurrent_bart.model.decoding.cached_layer import CacheShape
from recurrent_bart.model.decoding.fused_layer import FusedLayer, can_fuse
from tiny import tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

# a text of one token by greedy search, and a text of five tokens by sampling with beams
QUICK = (2, 4)


# all: greedy search, sampling and beams; both orders of norms, gated reads and prompts
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in range(16)]
)
def test_ids_are_hugging_faces(monkeypatch, seed):
    monkeypatch.setattr(cached_decoder, "can_fuse", lambda *_: True)
    calls, steps = count_loops(monkeypatch), []
    step = FusedLayer.step
    monkeypatch.setattr(FusedLayer, "step", lambda *args: steps.append(1) or step(*args))
    model, inputs, how = random_case(seed, 1 + seed % 4)
    how = how | {"max_new_tokens": min(8, how["max_new_tokens"])}
    found = generate(model, inputs, how)
    assert steps
    assert not calls
    assert torch.equal(found, generate(model, inputs, how, fast=False)), how


def fail_in_triton(self, hidden_RD, visible):
    """Raise an error of Triton."""
    import triton

    return triton.cdiv(None, 1)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_without_working_kernels_the_step_runs_without_them(monkeypatch, how):
    monkeypatch.setattr(cached_decoder, "can_fuse", lambda decoder, *_: decoder not in fused_layer._failed)
    monkeypatch.setattr(FusedLayer, "step", fail_in_triton)
    calls = count_loops(monkeypatch)
    model, inputs, how = tiny_model().eval(), documents(0, 2), how | {"max_new_tokens": 6}
    found = generate(model, inputs, how)
    assert not calls
    assert model.model.decoder in fused_layer._failed
    assert torch.equal(found, generate(model, inputs, how, fast=False))


def test_other_errors_of_a_step_are_raised(monkeypatch):
    def fail(*args):
        raise ValueError("wrong")

    monkeypatch.setattr(cached_decoder, "can_fuse", lambda *_: True)
    monkeypatch.setattr(FusedLayer, "step", fail)
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="wrong"):
        generate(model, documents(0, 2), {"max_new_tokens": 6})
    assert model.model.decoder not in fused_layer._failed


def test_kernels_are_for_gpus_and_plain_layers():
    decoder = tiny_model().model.decoder
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    shape = CacheShape(2, 1, 1, 8, 8, False, 0)
    assert can_fuse(decoder, shape, on_gpu)
    assert not can_fuse(decoder, shape, torch.zeros(1))
    assert not can_fuse(decoder, replace(shape, n_texts=17), on_gpu)
    assert not can_fuse(decoder, shape, SimpleNamespace(is_cuda=True, dtype=torch.float64))
    decoder.layers[1].fc1.weight = torch.nn.Parameter(decoder.layers[1].fc1.weight.detach().t().contiguous().t())
    assert not can_fuse(decoder, shape, on_gpu)
