"""Tests of cross-attention to contexts without padding: values and gradients of padded contexts."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from recurrent_bart.model import ragged_attention
from tiny import batch_of, random_ids

RAGGED = [[8, 8, 3], [5], [8, 2], [8, 8, 8]]
CONTEXTS = {
    "all": {"decoder_context": "all"},
    "all, dropout of attention off in evaluation": {"decoder_context": "all", "attention_dropout": 0.5},
    "two of all": {"decoder_context": "all", "context_segments": 2},
    "all without state": {"decoder_context": "all", "pre_seq_len": 0},
    "last": {"decoder_context": "last"},
    "memory": {"decoder_context": "memory"},
    "section": {"decoder_context": "section"},
    "pre-norm": {"decoder_context": "all", "normalize_before": True},
    "recomputed": {"decoder_context": "all", "checkpointed": True},
}


def attention_by_sequence(query, key, value, query_starts, key_starts, most_queries, most_keys, dropout):
    """Compute attention of each sequence alone, and check the arguments that a kernel trusts."""
    query_starts, key_starts = query_starts.tolist(), key_starts.tolist()
    assert (query_starts[-1], key_starts[-1]) == (len(query), len(key))
    assert most_keys == max(end - start for start, end in itertools.pairwise(key_starts))
    reads = []
    for number in range(len(query_starts) - 1):
        rows, columns = (slice(*starts[number : number + 2]) for starts in (query_starts, key_starts))
        assert rows.stop - rows.start == most_queries
        scores = torch.einsum("qhk,ahk->hqa", query[rows], key[columns]) / math.sqrt(query.shape[-1])
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout)
        reads.append(torch.einsum("hqa,ahk->qhk", weights, value[columns]))
    return torch.cat(reads)


@pytest.fixture
def read_ragged(monkeypatch):
    """Return a function that switches attention without padding on, and returns the list of its calls."""

    def switch_on():
        calls = []
        monkeypatch.setattr(
            ragged_attention, "flash_attention", lambda *parts: calls.append(parts) or attention_by_sequence(*parts)
        )
        monkeypatch.setattr(ragged_attention, "LEAST_POSITIONS", 1)
        monkeypatch.setattr(ragged_attention, "has_flash_attention", lambda config, hidden: True)
        return calls

    return switch_on


def run(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return [output.loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("task", ["documents", "sections"])
@pytest.mark.parametrize("fields", CONTEXTS.values(), ids=CONTEXTS)
def test_values_and_gradients_are_those_of_padded_contexts(make_model, read_ragged, fields, task):
    model = make_model(**{name: value for name, value in fields.items() if name != "checkpointed"}).double()
    if "checkpointed" in fields:
        model.gradient_checkpointing_enable()
        model.train()
    _, input_ids, mask = batch_of(RAGGED)
    labels = random_ids(4, 3, 6)
    labels[~mask.view(4, 3, -1).bool().any(dim=-1)] = -100
    if task == "documents":
        labels = random_ids(4, 6)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    expected = run(model, inputs)
    calls = read_ragged()
    found = run(model, inputs)
    # "memory" after the last segment has no padding here where all documents have as many segments
    assert calls
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_padded_positions_are_not_projected(make_model, read_ragged):
    model = make_model(decoder_context="all")
    _, input_ids, mask = batch_of(RAGGED)
    calls = read_ragged()
    model(input_ids=input_ids, attention_mask=mask, labels=random_ids(4, 6))
    n_slots = model.config.pre_seq_len
    assert len(calls) == model.config.decoder_layers
    assert {len(key) for _, key, *_ in calls} == {int(mask.sum()) + 4 * n_slots}


def test_a_cache_keeps_padded_keys_and_values(make_model, read_ragged):
    model = make_model(decoder_context="all").eval()
    _, input_ids, mask = batch_of(RAGGED)
    calls = read_ragged()
    output = model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=random_ids(4, 2), use_cache=True)
    assert not calls
    assert output.past_key_values is not None


def test_gated_attention_keeps_its_two_softmaxes(make_model):
    model = make_model(decoder_context="all", prefix_attention="gated")
    assert not ragged_attention.has_flash_attention(model.config, torch.zeros(1, 1))


@pytest.mark.parametrize("changed", ["rows", "mask"])
def test_outputs_that_a_caller_has_cut_are_read_with_their_mask(make_model, read_ragged, changed):
    model = make_model(decoder_context="all")
    _, input_ids, mask = batch_of(RAGGED)
    encoded = model.model.encode(input_ids, attention_mask=mask)
    calls = read_ragged()
    cut = replace(encoded, last_hidden_state=encoded.last_hidden_state[:2], context_mask=encoded.context_mask[:2])
    if changed == "mask":
        cut = replace(encoded, context_mask=encoded.context_mask.clone(), host_mask=None)
    n_rows = len(cut.last_hidden_state)
    model.model.decode(cut, input_ids=random_ids(n_rows, 3), use_cache=False)
    assert not calls


def test_another_flash_attention_reads_without_dropout_only(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert ragged_attention._is_flash_replaced()
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    assert not ragged_attention._is_flash_replaced()
