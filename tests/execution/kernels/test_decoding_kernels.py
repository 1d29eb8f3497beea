"""Kernels of a decoding step equal plain formulas in double precision, up to rounding; on a GPU if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from step_kernels import attention, check, dtypes, kernel_device, random


@pytest.fixture(autouse=True)
def device(monkeypatch):
    with kernel_device(monkeypatch):
        yield


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("n_sharing", [1, 3])
@pytest.mark.parametrize("here", [0, 1, 6, 45])
@pytest.mark.parametrize("head_width", [5, 16])
def test_each_text_attends_to_its_own_positions(dtype, n_sharing, here, head_width):
    from recurrent_bart.execution.kernels.step_attention import attend_to_text

    torch.manual_seed(here)
    n_caches, n_heads, n_positions = 2, 3, 48
    width, n_texts = n_heads * head_width, n_caches * n_sharing
    new, cache = (
        random(dtype, n_texts, 3 * width),
        random(dtype, 2, n_caches, n_heads, n_positions, n_sharing, head_width),
    )
    ancestor = torch.randint(n_sharing, (n_caches, n_sharing, n_positions))
    ancestor[:, :, here] = torch.arange(n_sharing)
    before = cache.clone()
    position = torch.tensor([here])
    found = attend_to_text(new, cache, position, None if n_sharing == 1 else ancestor, 0.3)
    query, *key_value = new.view(n_caches, n_sharing, 3, n_heads, head_width).permute(2, 0, 3, 1, 4)
    before[:, :, :, here] = torch.stack(key_value)
    assert torch.equal(cache, before)
    for text in range(n_texts):
        own, beam = divmod(text, n_sharing)
        key, value = cache[:, own].double().flatten(2, 3)
        is_seen = (ancestor[own, beam, :, None] == torch.arange(n_sharing)) | (n_sharing == 1)
        is_seen = is_seen & (torch.arange(n_positions) <= here).unsqueeze(1)
        check(
            found[text].view(n_heads, -1), attention(query[own, :, beam].double(), key, value, is_seen.flatten(), 0.3)
        )


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("n_texts", [1, 4])
@pytest.mark.parametrize("lengths", [None, (1, 97), (40, 8)])
@pytest.mark.parametrize("least_part", [512, 32])
def test_each_text_attends_to_the_context_of_its_document(monkeypatch, dtype, n_texts, lengths, least_part):
    from recurrent_bart.execution.kernels import step_attention

    monkeypatch.setattr(step_attention, "LEAST_PART", least_part)
    torch.manual_seed(0)
    n_documents, n_heads, n_keys, head_width = 2, 3, 100, 8
    query = random(dtype, n_documents * n_texts, n_heads * head_width)
    # a part of a longer buffer
    key, value = random(dtype, 2, n_documents, n_heads, n_keys + 3, head_width)[:, :, :, 3:]
    is_seen = torch.ones(n_documents, n_keys, dtype=torch.bool)
    mask = end = None
    if lengths is not None:
        is_seen = torch.arange(n_keys) < torch.tensor(lengths).unsqueeze(1)
        is_seen[1, 2] = False
        mask = torch.zeros(n_documents, n_keys, dtype=dtype).masked_fill_(~is_seen, -torch.inf)
        end = torch.tensor(lengths, dtype=torch.int32)
    found = step_attention.attend_to_context(query, key, value, mask, end, 0.3)
    assert step_attention.count_parts(6, n_keys, query.device) == (1 if least_part == 512 else 3)
    for text in range(n_documents * n_texts):
        own = text // n_texts
        asked = query[text].view(n_heads, -1).double()
        expected = attention(asked, key[own].double(), value[own].double(), is_seen[own], 0.3)
        check(found[text].view(n_heads, -1), expected)


def test_a_context_without_visible_positions_gives_zeros():
    from recurrent_bart.execution.kernels.step_attention import attend_to_context

    key = value = torch.randn(1, 2, 10, 8)
    mask, end = torch.full((1, 10), -torch.inf), torch.zeros(1, dtype=torch.int32)
    assert not attend_to_context(torch.randn(1, 16), key, value, mask, end, 1.0).any()
    assert not attend_to_context(torch.randn(3, 16), key, value, mask, end + 4, 1.0).any()


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("n_rows", [1, 3, 130])
@pytest.mark.parametrize(("width", "n_out"), [(24, 40), (2100, 7)])
def test_products_of_rows(dtype, n_rows, width, n_out):
    from recurrent_bart.execution.kernels.row_linear import linear_parts, linear_rows, linear_scores

    torch.manual_seed(0)
    rows, weight, bias = random(dtype, n_rows, width), random(dtype, n_out, width), random(dtype, n_out)
    product = rows.double() @ weight.double().T
    check(linear_rows(rows, weight, bias), product + bias.double())
    check(linear_rows(rows, weight, bias, has_gelu=True), gelu(product + bias.double()))
    scores = linear_scores(rows, weight, bias)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, scores.to(dtype).float())
    check(scores.to(dtype), product + bias.double())
    for n_parts in (1, 4):
        parts = linear_parts(rows, weight, n_parts)
        assert parts.dtype == torch.float32
        check(parts.sum(0).to(dtype), product)


@dtypes
@pytest.mark.parametrize("gives_sum", [False, True])
@pytest.mark.parametrize("part_type", [torch.float32, None])
def test_sum_of_parts_and_residual_is_normed(dtype, gives_sum, part_type):
    from recurrent_bart.execution.kernels.row_linear import add_and_norm

    torch.manual_seed(0)
    parts = random(part_type or dtype, 3, 5, 24)
    bias, weight, norm_bias = random(dtype, 3, 24)
    residual = random(dtype, 5, 24)
    normed, summed = add_and_norm(parts, bias, residual, weight, norm_bias, 1e-5, gives_sum)
    expected = parts.double().sum(0) + bias.double() + residual.double()
    check(normed, layer_norm(expected, [24], weight.double(), norm_bias.double(), 1e-5))
    check(summed, expected if gives_sum else normed.double())


@dtypes
@pytest.mark.parametrize("here", [0, 4])
def test_tokens_are_embedded(dtype, here):
    from recurrent_bart.execution.kernels.step_tokens import embed_tokens

    torch.manual_seed(0)
    token, tokens, positions = torch.randint(9, (5,)), random(dtype, 9, 24), random(dtype, 6, 24)
    weight, bias = random(dtype, 2, 24)
    found = embed_tokens(token, torch.tensor([here]), tokens, positions, 3.0, weight, bias, 1e-5)
    embedded = 3 * tokens[token].double() + positions[here].double()
    check(found, layer_norm(embedded, [24], weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("n_texts", [1, 5])
@pytest.mark.parametrize("eos", [[], [2], [2, 9001]])
def test_the_best_tokens_are_appended(n_texts, eos):
    from recurrent_bart.execution.kernels.step_tokens import append_best

    torch.manual_seed(n_texts)
    scores, ids = torch.randn(n_texts, 9002), torch.randint(4, 60, (n_texts, 6))
    # equal scores in one part and in several parts; the first token is the best
    scores[0, [4, 700, 5000]] = 9.0
    if n_texts > 1:
        scores[1, 9001] = scores[2, 2] = 9.0
        scores[3] = -torch.inf
    is_unfinished = torch.ones(n_texts, dtype=torch.bool)
    is_unfinished[n_texts - 1] = n_texts == 1
    expected = scores.argmax(dim=1).where(is_unfinished, 3)
    goes_on = is_unfinished & ~torch.isin(expected, torch.tensor(eos, dtype=torch.long))
    before, position, n_steps = ids.clone(), torch.tensor([2]), torch.tensor([7])
    append_best(scores, ids, position, is_unfinished, n_steps, torch.tensor(eos, dtype=torch.long), 3)
    assert expected[0] == 4
    assert torch.equal(ids[:, 3], expected)
    before[:, 3] = expected
    assert torch.equal(ids, before)
    assert torch.equal(is_unfinished, goes_on)
    assert (position.item(), n_steps.item()) == (3, 8)
    # nothing is unfinished: no further step counts, and pad tokens follow
    is_unfinished[:] = False
    append_best(scores, ids, position, is_unfinished, n_steps, torch.tensor([2]), 3)
    assert (ids[:, 4] == 3).all()
    assert (position.item(), n_steps.item()) == (4, 8)


@pytest.mark.parametrize("n_tokens", [4096, 5000])
def test_scores_that_are_not_numbers_and_views_give_the_token_of_argmax(n_tokens):
    from recurrent_bart.execution.kernels.step_tokens import append_best

    scores = torch.randn(n_tokens, 3).t()
    scores[0], scores[1, 70] = torch.nan, torch.nan
    for case in (scores, scores[2:].expand(3, -1)):
        ids, is_unfinished = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, dtype=torch.bool)
        counts = torch.tensor([0]), is_unfinished, torch.tensor([0])
        append_best(case, ids, *counts, torch.tensor([], dtype=torch.long), 1)
        assert torch.equal(ids[:, 1], case.argmax(dim=1))


def test_tiles_of_context_keys_fit_every_gpu():
    from recurrent_bart.execution.kernels.step_attention import context_tile, tile_size

    found = [
        context_tile(n_programs, tile_size(head_width) * n_bytes)[0] * tile_size(head_width) * n_bytes
        for n_programs in (8, 1000)
        for head_width in (8, 64, 80, 128)
        for n_bytes in (2, 4)
    ]
    # four tiles of 16 KiB, of 99 KiB on the smallest GPUs
    assert max(found) == 16_384


@pytest.mark.slow
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compile_for_gpus.py")
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert (ended.returncode, ended.stdout) == (0, "50 compiled\n"), ended.stdout + ended.stderr
