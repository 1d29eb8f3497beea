"""Attention to encoder outputs equals attention to their keys and values in double precision, up to rounding."""

import pytest
import torch
from torch.nn.functional import linear

from step_kernels import attention, check, dtypes, kernel_device, random


@pytest.fixture(autouse=True)
def device(monkeypatch):
    with kernel_device(monkeypatch):
        yield


def case(dtype, n_documents, n_texts, n_heads, head_width, n_keys):
    """Return queries, encoder outputs, weights of keys and values, and the values' bias."""
    torch.manual_seed(0)
    width = n_heads * head_width
    weights = [(random(dtype, width, width) / width**0.5).to(dtype) for _ in range(2)]
    query, context = random(dtype, n_documents * n_texts, width), random(dtype, n_documents, n_keys, width)
    return query, context, *weights, random(dtype, width)


def attend_naively(query, context, key_weight, value_weight, value_bias, n_heads, scale, is_seen):
    """Return the attention output `(R, D)` in double precision, with projected keys that have a bias."""
    query, context, key_weight, value_weight, value_bias = (
        part.double() for part in (query, context, key_weight, value_weight, value_bias)
    )
    key, value = linear(context, key_weight, 1 + value_bias), linear(context, value_weight, value_bias)
    key, value = (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in (key, value))
    n_texts = len(query) // len(context)
    return torch.stack(
        [
            attention(row.view(n_heads, -1), key[i // n_texts], value[i // n_texts], is_seen[i // n_texts], scale)
            for i, row in enumerate(query)
        ]
    ).flatten(1)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize(("n_texts", "n_heads", "head_width"), [(1, 3, 8), (4, 2, 16), (3, 12, 8), (5, 1, 24)])
@pytest.mark.parametrize("lengths", [None, (1, 197), (140, 8)])
@pytest.mark.parametrize("n_places", [1, 40])
def test_texts_attend_to_encoder_outputs(monkeypatch, dtype, n_texts, n_heads, head_width, lengths, n_places):
    from recurrent_bart.execution.kernels import latent_attention

    monkeypatch.setattr(latent_attention, "count_processors", lambda _: n_places)
    monkeypatch.setattr(latent_attention, "START_KEYS", 20)
    latent_attention.count_latent_parts.cache_clear()
    n_keys = 200
    parts = case(dtype, 2, n_texts, n_heads, head_width, n_keys)
    is_seen = torch.ones(2, n_keys, dtype=torch.bool)
    mask = end = None
    if lengths is not None:
        is_seen = torch.arange(n_keys) < torch.tensor(lengths).unsqueeze(1)
        is_seen[1, 2] = False
        mask = torch.zeros(2, n_keys, dtype=dtype).masked_fill_(~is_seen, -torch.inf)
        end = torch.tensor(lengths, dtype=torch.int32)
    found = latent_attention.attend_to_latents(*parts, n_heads, 0.3, mask, end)
    latent_attention.count_latent_parts.cache_clear()
    check(found, attend_naively(*parts, n_heads, 0.3, is_seen))


def test_a_context_without_visible_positions_gives_zeros():
    from recurrent_bart.execution.kernels.latent_attention import attend_to_latents

    parts = case(torch.float32, 2, 2, 2, 8, 10)
    mask, end = torch.zeros(2, 10), torch.tensor([0, 10], dtype=torch.int32)
    mask[0] = -torch.inf
    found = attend_to_latents(*parts, 2, 1.0, mask, end)
    assert not found[:2].any()
    assert found[2:].all()


def test_parts_fill_the_gpu():
    from recurrent_bart.execution.kernels.latent_attention import count_latent_parts

    assert count_latent_parts(1, 65_536, 132) == 132
    assert count_latent_parts(16, 8192, 132) == 8
    assert count_latent_parts(132, 8192, 132) == 1
    # 70 programs would leave half of the GPU without work
    assert count_latent_parts(70, 8192, 132) > 4
    assert count_latent_parts(1, 20, 132) == 1


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("n_rows", [12, 64])
def test_triton_loads_the_next_tiles_during_a_product(width, shared_kib, n_rows):
    from recurrent_bart.execution.kernels.latent_attention import latent_tile

    tile = latent_tile(n_rows, width, shared_kib)
    assert tile.n_chunks * tile.chunk >= width
    assert tile.keys > 256 * tile.n_chunks / tile.chunk
