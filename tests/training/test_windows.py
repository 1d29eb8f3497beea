"""Windows: their backward passes give the gradient of one pass over the whole batch."""

from dataclasses import replace

import pytest
import torch

from recurrent_bart.data.batches import Batch
from recurrent_bart.training.windows import bptt_windows, count_windows, window_losses
from tiny import random_ids

CPU = torch.device("cpu")
# decoder_context and context_segments
CONTEXTS = [("last", -1), ("memory", 2), ("section", -1), ("all", -1)]


@pytest.fixture
def batch():
    """Make three documents of 7, 1 and 4 segments, some without a target."""
    ids, mask = random_ids(3, 7, 8), torch.ones(3, 7, 8, dtype=torch.long)
    mask[1, 1:], mask[2, 4:], mask[0, 6, 5:] = 0, 0, 0
    labels = random_ids(3, 7, 5)
    labels[~mask.bool().any(-1)] = -100
    labels[0, 2], labels[0, 3, 2:], labels[2, 0] = -100, -100, -100
    return Batch(ids, mask, labels, indices=[0, 1, 2])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("depth", [1, -1])
def test_no_logits_are_made(make_model, batch, monkeypatch, depth):
    model = make_model(bptt_depth=depth).train()
    monkeypatch.delattr(type(model), "_logits")
    for loss in window_losses(model, model.config, batch, CPU, count_windows(batch, model.config), 1):
        loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.each_value
@pytest.mark.parametrize("extra", [0, 2], ids=["", "waiting for others"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("recurrence", ["layerwise", "top"])
@pytest.mark.parametrize("depth", [0, 1, 2, 6, 8])
def test_bptt_windows_give_the_loss_and_gradient_of_one_pass(make_model, batch, depth, recurrence, context, extra):
    fields = dict(zip(("decoder_context", "context_segments"), context, strict=True))
    model = make_model(bptt_depth=depth, recurrence=recurrence, **fields).train()
    n_items = batch.n_targets()
    loss = model(**batch.model_inputs(CPU), num_items_in_batch=n_items).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    n_windows, total = count_windows(batch, model.config) + extra, 0.0
    for window_loss in window_losses(model, model.config, batch, CPU, n_windows, n_items):
        window_loss.backward()
        total += window_loss.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(("depth", "n_windows"), [(0, 7), (1, 4), (2, 3), (6, 1), (-1, 1)])
def test_windows_are_counted(make_model, batch, depth, n_windows):
    config = make_model(bptt_depth=depth).config
    assert count_windows(batch, config) == n_windows
    # one target at the end has one backward pass
    assert count_windows(replace(batch, labels=batch.labels[:, 0]), config) == 1


def test_every_token_and_target_is_in_one_window(make_model, batch):
    windows = list(bptt_windows(batch, make_model(bptt_depth=2).config, 5))
    assert [window.input_ids.shape[1] for window in windows] == [1, 1, 1, 3, 3]
    assert sum(window.n_tokens() for window in windows) == batch.n_tokens()
    assert sum(window.n_targets() for window in windows) == batch.n_targets()
