"""A step by kernels gives Hugging Face's ids, in Triton's interpreter."""

import os

import pytest
import torch

from generation_options import count_loops, generate, random_case
from recurrent_bart.model.decoding import cached_decoder
from recurrent_bart.model.decoding.fused_layer import FusedLayer, can_fuse
from tiny import tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

# seeds whose texts are short
QUICK = (2, 4, 6, 10)


# greedy search, sampling and beams; both orders of norms, gated reads and prompts
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


def test_kernels_are_for_gpus_and_plain_layers():
    decoder = tiny_model().model.decoder
    assert not can_fuse(decoder, torch.zeros(1))
