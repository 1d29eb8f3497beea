"""Tests that the fast loop gives Hugging Face's ids, for random models, documents and options."""

import pytest
import torch
from transformers import GenerationMixin

from generation_options import FIELDS, count_loops, documents, generate, random_case
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from tiny import tiny_model


def assert_same_ids(seed, n_documents, calls):
    model, inputs, how = random_case(seed, n_documents)
    found = generate(model, inputs, how)
    state = torch.get_rng_state()
    assert not calls, how
    expected = generate(model, inputs, how, fast=False)
    assert len(calls) == 1
    calls.clear()
    assert found.shape == expected.shape, how
    assert torch.equal(found, expected), how
    # the next call draws the same random numbers too
    assert torch.equal(state, torch.get_rng_state())
    return found


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 24), marks=pytest.mark.slow)], ids=str)
@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_ids_are_hugging_faces(monkeypatch, seeds):
    calls = count_loops(monkeypatch)
    found = [assert_same_ids(seed, 3, calls) for seed in seeds]
    # texts differ, and some end early
    assert len({tuple(row.tolist()) for ids in found for row in ids}) > 25


@pytest.mark.parametrize(
    "how",
    [
        {"eos_token_id": list(range(2, 12))},
        {"eos_token_id": list(range(2, 30)), "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        pytest.param(
            {"num_beams": 3, "eos_token_id": list(range(2, 14)), "num_return_sequences": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"num_beams": 2, "eos_token_id": list(range(2, 14)), "early_stopping": True, "length_penalty": 2.0},
            marks=pytest.mark.slow,
        ),
        {"num_beams": 2, "eos_token_id": list(range(2, 14)), "early_stopping": "never", "length_penalty": -1.0},
        {"num_beams": 3, "eos_token_id": list(range(2, 14)), "early_stopping": True, "min_new_tokens": 4},
    ],
)
def test_finished_documents_leave_the_batch_and_change_no_id(monkeypatch, how):
    calls, n_left = count_loops(monkeypatch), []
    keep = CachedDecoder.keep
    monkeypatch.setattr(CachedDecoder, "keep", lambda self, rows: n_left.append(len(rows)) or keep(self, rows))
    # reads of the state and contexts of both kinds
    for fields in FIELDS[1:3]:
        torch.manual_seed(0)
        model = tiny_model(**fields, init_std=0.5, forced_eos_token_id=None).eval()
        # other beginnings, so that texts end at different lengths
        inputs = documents(0, 9) | {"decoder_input_ids": torch.randint(4, 60, (9, 3))}
        found = generate(model, inputs, {"max_new_tokens": 30} | how)
        assert not calls
        assert torch.equal(found, generate(model, inputs, {"max_new_tokens": 30} | how, fast=False))
        calls.clear()
    assert len(n_left) >= 2
    assert all(0 < n < 9 for n in n_left)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_ids_are_hugging_faces_for_many_documents_and_options(monkeypatch):
    calls = count_loops(monkeypatch)
    for seed in range(1000, 1200):
        assert_same_ids(seed, 1 + seed % 5, calls)


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_hugging_faces_cache_is_built_for_its_own_loop_alone(monkeypatch, how):
    prepare, prepared = GenerationMixin._prepare_cache_for_generation, []

    def counted(self, config, kwargs, *rest):
        prepare(self, config, kwargs, *rest)
        prepared.append(type(kwargs["past_key_values"]).__name__)

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", counted)
    model, inputs = tiny_model().eval(), documents(0, 2)
    found = generate(model, inputs, how | {"max_new_tokens": 6})
    assert not prepared
    assert torch.equal(found, generate(model, inputs, how | {"max_new_tokens": 6}, fast=False))
    assert prepared == ["EncoderDecoderCache"]
