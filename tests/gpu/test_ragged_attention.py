"""A GPU reads contexts of different lengths without padding, and gives the numbers of padded contexts."""

import itertools

import pytest
import torch

from recurrent_bart.model import ragged_attention
from tiny import random_ids, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("width", [64, 16])
def test_values_and_gradients_of_each_sequence(width):
    torch.manual_seed(0)
    lengths, n_queries = torch.tensor([700, 1, 130, 64]), 37
    layout = ragged_attention.RaggedContexts.of_lengths(lengths, torch.device("cuda"))
    like = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(4, n_queries, 8, width, **like).transpose(1, 2).requires_grad_()
    key_value = [torch.randn(1, int(lengths.sum()), 8, width, **like).transpose(1, 2) for _ in range(2)]
    for part in key_value:
        part.requires_grad_()
    found = layout.attend(query, key_value, 0.0)
    found.sin().sum().backward()
    gradients = [part.grad.float() for part in (query, *key_value)]
    exact = [part.detach().float().requires_grad_() for part in (query, *key_value)]
    ends = [0, *lengths.cumsum(0).tolist()]
    reads = [
        torch.nn.functional.scaled_dot_product_attention(
            exact[0][row : row + 1], *(part[:, :, start:end] for part in exact[1:])
        )
        for row, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    expected = torch.cat(reads).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)
    expected.sin().sum().backward()
    for got, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got, wanted.grad, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("task", ["documents", "sections"])
def test_a_training_pass_gives_the_numbers_of_padded_contexts(monkeypatch, task):
    torch.manual_seed(0)
    fields = {
        "decoder_context": "section" if task == "sections" else "all",
        "d_model": 64,
        "segment_size": 32,
        "init_std": 0.05,
    }
    model = tiny_model(**fields).cuda().to(torch.bfloat16).train()
    mask = torch.ones(3, 4, 32, dtype=torch.long)
    mask[1, 3], mask[1, 2, 5:], mask[2, 1:] = 0, 0, 0
    labels = random_ids(3, 4, 6)
    labels[~mask.bool().any(-1)] = -100
    inputs = {"input_ids": random_ids(3, 4, 32), "attention_mask": mask}
    inputs["labels"] = labels if task == "sections" else random_ids(3, 6)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    runs, calls, attend = [], [], ragged_attention.flash_attention
    monkeypatch.setattr(ragged_attention, "flash_attention", lambda *parts: calls.append(len(runs)) or attend(*parts))
    for least in (1, 10**9):
        monkeypatch.setattr(ragged_attention, "LEAST_POSITIONS", least)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        runs.append([loss.float(), *(p.grad.float() for p in model.parameters())])
    assert set(calls) == {0}
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()) + 1e-3)
