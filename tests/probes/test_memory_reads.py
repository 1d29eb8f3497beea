"""Tests that the size of a read equals its contribution to the layer's output."""

import itertools

import pytest
import torch

from recurrent_bart.model import decoder_attention
from recurrent_bart.probes.memory_reads import plain_execution, read_context, read_segment
from recurrent_bart.recurrence import cell as encoder_cell
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from tiny import NORM_ORDERS, random_ids

VARIANTS = list(itertools.product(("layerwise", "top", "none"), ("gated", "concat"), (True, False)))


def norms(read_LHK):
    return read_LHK.flatten(1).norm(dim=1)


@pytest.mark.each_value
@pytest.mark.parametrize("order", NORM_ORDERS.values(), ids=NORM_ORDERS)
@pytest.mark.parametrize(("recurrence", "prefix_attention_kind", "prefix_projection"), VARIANTS)
@torch.no_grad()
def test_sizes_equal_the_norms_of_attention_outputs(
    recurrence, prefix_attention_kind, prefix_projection, make_model, monkeypatch, order
):
    fields = {"prefix_attention": prefix_attention_kind, "prefix_projection": prefix_projection}
    model = make_model(recurrence=recurrence, **fields, **order)
    heard = []
    attend = encoder_cell.attend

    def listen(attention, query, key_value, mask):
        read, weights = attend(attention, query, key_value, mask)
        heard.append((read[0], weights[0], key_value[1][0]))
        return read, weights

    monkeypatch.setattr(encoder_cell, "attend", listen)
    ids, mask = random_ids(1, 3, 8), torch.ones(1, 3, 8, dtype=torch.long)
    mask[0, 2, 5:] = 0
    state = RecurrentState.unread(model.config, 1)
    with plain_execution(model.config):
        for t in range(3):
            heard.clear()
            output, reads = read_segment(model, ids[:, t : t + 1], mask[:, t : t + 1], state)
            state = output.state
            n_tokens = int(mask[0, t].sum())
            assert reads.size.shape == (3, n_tokens)
            assert reads.mass.min() > 0
            per_layer = len(heard) // 3
            for layer in range(3):
                read, weights, values = heard[layer * per_layer]
                if prefix_attention_kind == "gated":
                    gate = model.model.encoder.recurrence.prefix_gate[layer].tanh().view(1, -1, 1)
                    memory, tokens = gate * heard[layer * per_layer + 1][0], read
                else:
                    memory, tokens = (
                        (weights[..., part] @ values[:, part]).transpose(0, 1) for part in (slice(3), slice(3, None))
                    )
                expected = (norms(memory) / norms(tokens))[:n_tokens]
                torch.testing.assert_close(reads.size[layer], expected.float(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_nothing_is_read_through_a_closed_gate(make_model):
    model = make_model(prefix_attention="gated")
    model.model.encoder.recurrence.prefix_gate[1] = 0
    ids = random_ids(1, 1, 8)
    with plain_execution(model.config):
        _, reads = read_segment(model, ids, torch.ones_like(ids), RecurrentState.unread(model.config, 1))
    assert reads.size[1].eq(0).all()
    assert reads.mass[1] == 0
    assert reads.size[[0, 2]].gt(0).all()


@pytest.mark.parametrize("kind", ["gated", "concat"])
@pytest.mark.parametrize("decoder_context", ["last", "memory", "all"])
@torch.no_grad()
def test_the_decoder_reads_from_the_states_in_its_context(kind, decoder_context, make_model, monkeypatch):
    model = make_model(prefix_attention=kind, decoder_context=decoder_context)
    ids, text = random_ids(1, 3, 8), random_ids(1, 5)
    heard = []
    attend = decoder_attention.attend

    def listen(attention, query, key_value, mask):
        read, weights = attend(attention, query, key_value, mask)
        heard.append((read[0], weights[0], key_value[1][0]))
        return read, weights

    with plain_execution(model.config):
        context = model.model.encode(ids)
        monkeypatch.setattr(decoder_attention, "attend", listen)
        reads = read_context(model, context, text)
    n_memory = 9 if decoder_context == "memory" else 3
    for number, layer in enumerate(model.model.decoder.layers):
        if kind == "gated":
            tokens, memory = heard[2 * number][0], heard[2 * number + 1][0]
            memory = layer.encoder_attn.memory_gate.tanh().view(1, -1, 1) * memory
        else:
            _, weights, values = heard[number]
            memory, tokens = (
                (weights[..., part] @ values[:, part]).transpose(0, 1)
                for part in (slice(n_memory), slice(n_memory, None))
            )
        torch.testing.assert_close(reads.size[number], (norms(memory) / norms(tokens)).float(), rtol=1e-4, atol=1e-6)
    assert reads.mass.min() > 0


def test_a_decoder_without_states_in_its_context_reads_no_state(make_model):
    model = make_model(recurrence="none")
    with plain_execution(model.config):
        assert read_context(model, model.model.encode(random_ids(1, 2, 8)), random_ids(1, 4)) is None
