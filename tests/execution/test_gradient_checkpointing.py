"""Gradient checkpointing changes memory, and no result."""

import pytest
import torch

from tiny import random_ids, tiny_model

VARIANTS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "windows": {"bptt_depth": 1},
    "top": {"recurrence": "top"},
    "static": {"recurrence": "none", "decoder_context": "all"},
    "memory": {"decoder_context": "memory"},
    "wavefront": {"schedule": "wavefront"},
    "associative": {"associative_memory": True},
    "associative wavefront": {"associative_memory": True, "schedule": "wavefront"},
    "concat windows wavefront": {"prefix_attention": "concat", "bptt_depth": 1, "schedule": "wavefront"},
}
VARIANTS |= {f"{name} pre-norm": fields | {"normalize_before": True} for name, fields in VARIANTS.items()}


def loss_and_gradients(grain, labels_shape, **fields):
    torch.manual_seed(0)
    model = tiny_model(dropout=0.2, attention_dropout=0.2, hidden_dropout_prob=0.2, **fields).double().train()
    model.set_gradient_checkpointing(grain)
    torch.manual_seed(1)
    mask = torch.ones(2, 4, 8, dtype=torch.long)
    mask[1, 3], mask[1, 2, 5:] = 0, 0
    labels = random_ids(*labels_shape)
    if len(labels_shape) == 3:
        labels[1, 3] = -100
    loss = model(input_ids=random_ids(2, 4, 8), attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("labels_shape", [(2, 5), (2, 4, 5)], ids=["document", "sections"])
@pytest.mark.parametrize("grain", ["layer", "segment"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients_are_the_same_with_dropout_on(fields, grain, labels_shape):
    loss, gradients = loss_and_gradients("none", labels_shape, **fields)
    checkpointed_loss, checkpointed = loss_and_gradients(grain, labels_shape, **fields)
    assert loss == checkpointed_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("grain", ["layer", "segment"])
def test_the_prefix_is_alive_under_it(grain):
    """Hugging Face's layer checkpointing would drop the prefix: no gradient, and no effect on the loss."""
    loss, gradients = loss_and_gradients(grain, (2, 5))
    assert gradients["model.encoder.recurrence.projection_out"].abs().max() > 1e-6
    assert gradients["model.encoder.recurrence.initial_memory"].abs().max() > 1e-6
    without, _ = loss_and_gradients(grain, (2, 5), pre_seq_len=0)
    assert abs(loss - without) > 1e-6


def saved_bytes(grain, n_segments):
    """Return the bytes that a forward pass saves for its backward pass."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    model = tiny_model().train()
    model.set_gradient_checkpointing(grain)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=random_ids(1, n_segments, 8), labels=random_ids(1, 4))
    return total


def test_memory_falls_with_the_grain():
    """One more segment adds its whole autograd graph, its layers' inputs, or its state."""
    growth = {grain: saved_bytes(grain, 8) - saved_bytes(grain, 4) for grain in ("none", "layer", "segment")}
    assert growth["none"] > 3 * growth["layer"]
    assert growth["layer"] > 2 * growth["segment"]


def test_reentrant_checkpointing_is_refused_on_every_way(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model.model.encoder.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.model.encoder.layers)


def test_an_unknown_grain_is_refused(make_model):
    with pytest.raises(ValueError, match="'token': allowed are none, layer, segment"):
        make_model().set_gradient_checkpointing("token")


def test_it_can_be_switched_off_again(make_model):
    model = make_model()
    model.set_gradient_checkpointing("segment")
    model.set_gradient_checkpointing("none")
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert modules
    assert not any(module.gradient_checkpointing for module in modules)
    assert not model.model.encoder.checkpoints_segments
