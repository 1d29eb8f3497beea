"""Tests that the chunked loss equals the loss from logits, in values and gradients, and needs less memory."""

import copy

import pytest
import torch

from recurrent_bart.model import token_head
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.model.token_head import TokenHead
from recurrent_bart.monitoring.memory import peak_bytes
from tiny import TINY, batch_of, random_ids, tiny_model

LENGTHS = [[8, 8, 8], [8, 5], [3]]
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "counted": {"num_items_in_batch": 7},
    "smoothed": {"smoothing": 0.2},
    "smoothed oracle": {"smoothing": 0.2, "oracle": Oracle("word", gold_probability=0.0, temperature=0.0)},
    "oracle": {"oracle": Oracle("word", gold_probability=0.0, temperature=0.0)},
}

# arguments of forward, not of the model
OPTIONS = ("num_items_in_batch", "oracle", "smoothing")


def documents(per_segment, lengths=LENGTHS):
    _, input_ids, mask = batch_of(lengths)
    labels = random_ids(*mask.shape[:2], 5) if per_segment else random_ids(len(mask), 5)
    labels[..., 4:] = -100
    if per_segment:
        labels[~mask.bool().any(-1)] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, inputs, **options):
    model.zero_grad()
    output = model(**inputs, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.each_value
@pytest.mark.parametrize("per_segment", [False, True], ids=["document", "sections"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients_are_those_with_logits(monkeypatch, fields, per_segment):
    # several chunks, the last one smaller
    monkeypatch.setattr(token_head, "CHUNK_SCORES", 4 * TINY["vocab_size"])
    fields = dict(fields)
    options = {name: fields.pop(name) for name in OPTIONS if name in fields}
    model, inputs = tiny_model(**fields).double().train(), documents(per_segment)
    model.final_logits_bias.normal_()
    expected, expected_gradients = loss_and_gradients(model, inputs, **options)
    found, gradients = loss_and_gradients(model, inputs, **options, return_logits=False)
    assert found.logits is None
    assert expected.logits is not None
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("per_segment", [False, True], ids=["document", "sections"])
def test_a_smoothed_loss_is_that_of_cross_entropy(monkeypatch, per_segment, return_logits):
    monkeypatch.setattr(token_head, "CHUNK_SCORES", 4 * TINY["vocab_size"])
    model, inputs = tiny_model().double().train(), documents(per_segment)
    model.final_logits_bias.normal_()
    logits, labels = model(**inputs).logits.flatten(0, -2), inputs["labels"].flatten()
    model.zero_grad()
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.3)
    expected.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    options = {"smoothing": 0.3, "return_logits": return_logits}
    found, gradients = loss_and_gradients(model, inputs, **options)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert found.loss.item() != pytest.approx(model(**inputs).loss.item(), rel=1e-3)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("smoothing", [-0.5, 1.0, 1.5])
def test_a_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=f"smoothing={smoothing}: must be at least 0 and below 1"):
        tiny_model()(**documents(per_segment=False), smoothing=smoothing, return_logits=False)


def test_bfloat16_gradients_are_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(token_head, "CHUNK_SCORES", 4 * 20)
    hidden, labels, bias = torch.randn(1, 4000, 8).bfloat16(), torch.randint(20, (1, 4000)), torch.zeros(1, 20)
    head = TokenHead(8, 20, bias=False).bfloat16()
    precise = copy.deepcopy(head).float()
    head(hidden, labels, bias.bfloat16()).backward()
    precise(hidden.float(), labels, bias).backward()
    error = head.weight.grad.float() - precise.weight.grad
    # a sum of 1000 parts in bfloat16 would have ten times this error
    assert error.norm() < 1e-2 * precise.weight.grad.norm()


def test_a_frozen_vocabulary_has_no_gradient():
    model = tiny_model().train()
    model.model.shared.weight.requires_grad_(False)
    model(**documents(False), return_logits=False).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.decoder.layers[0].fc1.weight.grad.any()


def test_a_resized_model_has_the_loss_too():
    model, inputs = tiny_model(tie_word_embeddings=False).train(), documents(False)
    model.resize_token_embeddings(64)
    loss = model(**inputs, return_logits=False).loss
    torch.testing.assert_close(loss, model(**inputs).loss)


@pytest.mark.slow
def test_scores_of_all_targets_are_never_in_memory_together(monkeypatch):
    monkeypatch.setattr(token_head, "CHUNK_SCORES", 512 * 8000)
    head, labels = TokenHead(16, 8000, bias=False), torch.randint(8000, (8, 512))
    hidden, bias = torch.randn(8, 512, 16, requires_grad=True), torch.zeros(1, 8000)

    def with_logits():
        loss = torch.nn.functional.cross_entropy((head(hidden) + bias).flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()

    whole = peak_bytes(with_logits, torch.device("cpu"))
    chunked = peak_bytes(lambda: head(hidden, labels, bias).backward(), torch.device("cpu"))
    assert chunked < whole / 4


def test_targets_of_every_segment_are_put_back_as_views():
    model = tiny_model().eval()
    inputs = documents(True, [[8, 8, 8], [8, 8, 8]])
    inputs["labels"] = inputs["labels"].clamp(min=4)
    assert model(**inputs).logits.shape == (2, 3, 5, 60)
    inputs["labels"][1, 0] = -100
    logits = model(**inputs).logits
    assert not logits[1, 0].any()
    assert logits[1, 1].any()
