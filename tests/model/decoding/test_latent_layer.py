"""A step that attends to encoder outputs gives Hugging Face's ids, in Triton's interpreter."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from generation_options import count_loops, documents, generate, random_case
from played_graphs import play_graphs
from recurrent_bart.model.decoding import cached_decoder, fast_generation, latent_layer, session, session_store
from recurrent_bart.model.decoding.cached_layer import CacheShape
from recurrent_bart.model.decoding.latent_layer import LatentLayer, can_read_latents
from tiny import tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

# seeds whose texts are short
QUICK = (2, 6, 10)


@pytest.fixture
def latents(monkeypatch):
    """Attend to encoder outputs, and return the growing list of steps of layers."""
    monkeypatch.setattr(cached_decoder, "can_fuse", lambda *_: True)
    monkeypatch.setattr(cached_decoder, "can_read_latents", lambda *_: True)
    read, steps = LatentLayer._read_tokens, []
    monkeypatch.setattr(LatentLayer, "_read_tokens", lambda *args: steps.append(1) or read(*args))
    return steps


# greedy search, sampling and beams; both orders of norms, gated reads and prompts
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in range(16)]
)
def test_ids_are_hugging_faces(monkeypatch, latents, seed):
    calls = count_loops(monkeypatch)
    model, inputs, how = random_case(seed, 1 + seed % 4)
    how = how | {"max_new_tokens": min(8, how["max_new_tokens"])}
    found = generate(model, inputs, how)
    assert latents
    assert not calls
    assert torch.equal(found, generate(model, inputs, how, fast=False)), how


@pytest.mark.slow
def test_a_captured_session_reads_other_contexts_and_trained_weights(monkeypatch, latents):
    monkeypatch.setattr(fast_generation.Batch, "can_capture", True)
    graphs = play_graphs(monkeypatch, session)
    torch.manual_seed(0)
    model, how = tiny_model(prefix_attention="gated").eval(), {"max_new_tokens": 3}
    for seed in range(2):
        inputs = documents(seed, 2)
        assert torch.equal(generate(model, inputs, how), generate(model, inputs, how, fast=False))
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
    assert latents
    assert len(graphs) == 1


@pytest.mark.slow
def test_no_keys_and_values_of_tokens_are_kept(monkeypatch, latents):
    monkeypatch.setattr(fast_generation.Batch, "can_capture", True)
    play_graphs(monkeypatch, session)
    model = tiny_model(prefix_attention="gated").eval()
    generate(model, documents(0, 2), {"max_new_tokens": 1})
    (kept,) = session_store.session_store(model).sessions.values()
    decoder = kept.decoder
    assert {layer.context_kv.shape[3] for layer in decoder.layers} == {decoder.shape.n_memory}
    n_tokens = decoder.shape.n_context - decoder.shape.n_memory
    assert decoder.context_BAD.shape == (2, n_tokens, model.config.d_model)
    n_bytes = decoder.n_bytes()
    decoder.context_BAD = None
    assert n_bytes - decoder.n_bytes() == 4 * 2 * n_tokens * model.config.d_model
    session_store.drop_sessions(model)


def replace_type(like, dtype):
    return SimpleNamespace(device=like.device, dtype=dtype, element_size=lambda: dtype.itemsize)


def test_long_contexts_of_plain_layers_on_a_gpu_are_read_directly(monkeypatch):
    from recurrent_bart.execution.kernels import latent_attention

    width = tiny_model().config.d_model
    # keys and values of 64 positions in two layers fill a third of it
    monkeypatch.setattr(latent_layer, "memory_bytes", lambda device: 3 * 2 * 2 * 64 * width * 2)
    monkeypatch.setattr(latent_layer, "WIDTHS", (width,))
    kib = {"cuda": 99}
    monkeypatch.setattr(latent_attention, "shared_kib", lambda device: kib[device.type])
    decoder = tiny_model().model.decoder
    like = replace_type(SimpleNamespace(device=torch.device("cuda")), torch.bfloat16)
    shape = CacheShape(2, 1, 1, 8, 40, False, 8)
    assert can_read_latents(decoder, shape, like)
    assert not can_read_latents(decoder, replace(shape, n_memory=9), like)
    assert not can_read_latents(decoder, replace(shape, n_texts=33), like)
    assert not can_read_latents(decoder, shape, replace_type(like, torch.float32))
    kib["cuda"] = 64
    assert not can_read_latents(decoder, shape, like)
    kib["cuda"] = 99
    cross = decoder.layers[1].encoder_attn
    cross.v_proj = torch.nn.Sequential(cross.v_proj)
    assert not can_read_latents(decoder, shape, like)
