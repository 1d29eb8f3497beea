"""Tests that a training step never synchronizes with the device.

Tensors on the device `meta` have no values. Code that reads one fails; on a GPU it would synchronize.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recurrent_bart.model import decoder_context
from tiny import batch_of, random_ids, tiny_model

LENGTHS = [[8, 8, 8], [8, 5], [3]]
VARIANTS = {
    "sequential": {"schedule": "sequential"},
    "wavefront": {"schedule": "wavefront"},
    "eager back-end": {"attn_implementation": "eager"},
    "one softmax": {"prefix_attention": "concat"},
    "windows": {"bptt_depth": 1},
    "no gradient between segments": {"bptt_depth": 0},
    "top": {"recurrence": "top"},
    "memory": {"decoder_context": "memory"},
    "section": {"decoder_context": "section"},
    "all, static": {"decoder_context": "all", "recurrence": "none"},
    "no recurrence": {"pre_seq_len": 0},
}


def model_without_values(**fields):
    model = tiny_model(**fields).to("meta")
    model.tie_weights()
    return model


def targets(mask_BNL, per_segment):
    labels = random_ids(*mask_BNL.shape[:2], 5)
    labels[~mask_BNL.bool().any(-1)] = -100
    return labels if per_segment else random_ids(len(labels), 5)


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("per_segment", [False, True], ids=["document", "sections"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_training_step_looks_at_nothing_that_the_device_has(monkeypatch, fields, padded, per_segment):
    # pack all contexts of different lengths
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    _, input_ids, mask = batch_of(LENGTHS if padded else [[8, 8, 8]] * 2)
    model = model_without_values(**fields).train()
    labels = targets(mask, per_segment)
    loss = model(input_ids.to("meta"), attention_mask=mask if padded else None, labels=labels).loss
    loss.backward()
    assert loss.device.type == "meta"
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class Copied(TorchDispatchMode):
    """Dispatch mode that collects the shapes of tensors copied from the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation in COPIES:
            places = {leaf.device.type for leaf in tree_leaves((args, result)) if torch.is_tensor(leaf)}
            self.shapes += [tuple(result.shape)] if len(places) > 1 else []
        return result


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_of_documents_without_padding_labels_alone_are_copied(fields):
    # a CUDA graph cannot contain other copies: their source tensors are freed before the replay
    _, input_ids, mask = batch_of([[8, 8, 8]] * 2)
    model, labels, input_ids = model_without_values(**fields), targets(mask, False), input_ids.to("meta")
    with Copied() as copied:
        model(input_ids, labels=labels).loss.backward()
    assert copied.shapes == [tuple(labels.shape)]


@pytest.mark.slow
@pytest.mark.parametrize("grain", ["layer", "segment"])
def test_nor_does_one_that_recomputes(grain):
    _, input_ids, mask = batch_of(LENGTHS)
    model = model_without_values(schedule="wavefront").train()
    model.set_gradient_checkpointing(grain)
    model(input_ids.to("meta"), attention_mask=mask, labels=targets(mask, False)).loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_nor_does_reading_on_from_a_state(schedule):
    _, input_ids, mask = batch_of(LENGTHS)
    model = model_without_values(schedule=schedule).eval().model
    state = model.encode(input_ids.to("meta"), mask).state
    assert model.encode(input_ids.to("meta"), mask, state=state).state.memory.device.type == "meta"
