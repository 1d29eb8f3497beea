"""The RMT of the benchmark is a Recurrent Memory Transformer."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from recurrent_bart.benchmarks.models.benchmark_models import recompute_layers
from recurrent_bart.benchmarks.models.rmt import RecurrentMemoryBart
from tiny import TINY, random_ids

N_MEMORY, N_SEGMENTS, LENGTH = 3, 4, 8


@pytest.fixture(scope="module")
def labels():
    return random_ids(2, 5)


def build(n_memory=N_MEMORY, bptt_depth=-1):
    torch.manual_seed(0)
    return RecurrentMemoryBart(BartConfig(**TINY), n_memory, bptt_depth).double()


def test_without_memory_it_is_bart_on_the_last_segment(labels):
    model = build(n_memory=0)
    ids = random_ids(2, N_SEGMENTS, LENGTH)
    expected = model.bart(ids[:, -1], labels=labels).loss
    torch.testing.assert_close(model(ids, labels), expected, rtol=1e-12, atol=0)


def test_memory_is_what_came_out_at_its_places(labels):
    model = build().eval()
    ids = random_ids(1, 2, LENGTH)
    embed, encoder = model.bart.model.shared, model.bart.model.encoder
    first = encoder(inputs_embeds=torch.cat([model.memory[None], embed(ids[:, 0])], dim=1)).last_hidden_state
    expected = encoder(inputs_embeds=torch.cat([first[:, :N_MEMORY], embed(ids[:, 1])], dim=1)).last_hidden_state
    torch.testing.assert_close(model.encode(ids), expected, rtol=1e-12, atol=1e-12)


def test_the_first_segment_reaches_the_loss_through_all_others(labels):
    model = build()
    ids = random_ids(2, N_SEGMENTS, LENGTH)
    other = ids.clone()
    other[:, 0] = random_ids(2, LENGTH)
    assert (model(ids, labels) - model(other, labels)).abs() > 1e-9


@pytest.mark.parametrize(("bptt_depth", "is_reached"), [(-1, True), (3, True), (2, False), (0, False)])
def test_gradient_crosses_as_many_boundaries_as_it_should(labels, bptt_depth, is_reached):
    model = build(bptt_depth=bptt_depth)
    model(random_ids(2, N_SEGMENTS, LENGTH), labels).backward()
    # the initial memory precedes the first segment only
    gradient = model.memory.grad
    assert (gradient is not None and bool(gradient.abs().max() > 0)) is is_reached
    assert model.bart.model.encoder.layers[0].fc1.weight.grad.abs().max() > 0


def test_recomputing_layers_changes_nothing(labels):
    ids = random_ids(2, N_SEGMENTS, LENGTH)
    losses, gradients = [], []
    for is_recomputed in (False, True):
        model = build().train()
        if is_recomputed:
            recompute_layers(model.bart)
        loss = model(ids, labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.memory.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-15)


def test_its_encoder_is_hugging_faces(labels):
    assert type(build().bart) is BartForConditionalGeneration
