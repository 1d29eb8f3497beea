"""Tests that the fast loop gives Hugging Face's ids, for random models, documents and options."""

import pytest
import torch

from generation_options import count_loops, generate, random_case


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


@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_ids_are_hugging_faces(monkeypatch):
    calls = count_loops(monkeypatch)
    found = [assert_same_ids(seed, 3, calls) for seed in range(24)]
    # texts differ, and some end early
    assert len({tuple(row.tolist()) for ids in found for row in ids}) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_ids_are_hugging_faces_for_many_documents_and_options(monkeypatch):
    calls = count_loops(monkeypatch)
    for seed in range(1000, 1200):
        assert_same_ids(seed, 1 + seed % 5, calls)
