"""Fused kernel between projections and attention: builds queries, keys and values of slots, tokens and prefix.

One buffer holds the keys `slots, prefix, tokens` of a cell. Slots attend to all keys. Tokens attend to a view of the
buffer, as does a separate softmax over the prefix.
"""

# A layer's prefix is its state as keys and values. Its slots are the positions that write the next state.
# Shape suffixes: E encoder layers (of a diagonal), R = layers * documents, M = documents * slots, S = slots and tokens
# of a segment, P prefix length (= slots), A attended length, Q querying length, H heads, K head width, D model width,
# X = 3 * D (queries, keys, values) or 2 * D (keys, values).

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from recurrent_bart.execution.kernels.programs import add_up, draw_seed, drop, n_chunks


class Heads(NamedTuple):
    """Queries `(R, H, Q, K)`, keys and values `(R, H, A, K)` of each attention of a cell.

    Each field has its own gradient, though fields are views of shared buffers. With one softmax over prefix and tokens,
    `tokens_key` and `tokens_value` begin with the prefix, and the last three fields are None.
    """

    slots_query: Tensor
    slots_key: Tensor
    slots_value: Tensor
    tokens_query: Tensor
    tokens_key: Tensor
    tokens_value: Tensor
    prefix_query: Tensor | None = None
    prefix_key: Tensor | None = None
    prefix_value: Tensor | None = None


def split_heads(
    qkv_RSX: Tensor, bias: Tensor, prefix_EMX: Tensor, prefix_bias: Tensor, n_heads: int, is_gated: bool, p: float
) -> Heads:
    """Add biases, apply dropout to the prefix, and split heads.

    Args:
        qkv_RSX: Queries, keys and values `(R, S, 3 * D)` without bias, slots in front of tokens.
        bias: `(E, 1, 3 * D)`.
        prefix_EMX: Keys and values `(E, M, 2 * D)` of the prefix, without bias.
        prefix_bias: `(E, 1, 2 * D)`.
        n_heads: Number of heads.
        is_gated: True if the prefix has a separate softmax.
        p: Dropout probability of the prefix.
    """
    return Heads(*_SplitHeads.apply(qkv_RSX, bias, prefix_EMX, prefix_bias, n_heads, is_gated, p))


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor,
        prefix: Tensor,
        prefix_bias: Tensor,
        n_heads: int,
        is_gated: bool,
        p: float,
    ) -> tuple[Tensor, ...]:
        n_rows, n_positions, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        n_slots = prefix.shape[0] * prefix.shape[1] // n_rows
        query = qkv.new_empty(n_rows, n_positions, n_heads, width // n_heads)
        key, value = qkv.new_empty(2, n_rows, n_positions + n_slots, n_heads, width // n_heads)
        seed = draw_seed(qkv.device) if p else qkv
        prefix_bias = prefix_bias.contiguous()
        _split[(n_rows, n_positions + n_slots)](
            qkv.contiguous(), bias, prefix.contiguous(), prefix_bias, seed, query, key, value,
            n_rows // len(bias), n_positions, n_slots, width, p,
            HAS_DROPOUT=p > 0, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(seed if p else None)
        ctx.is_gated, ctx.n_slots, ctx.p, ctx.width = is_gated, n_slots, p, width
        ctx.n_layers, ctx.bias_type = len(bias), bias.dtype
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        tokens_see = 2 * n_slots if is_gated else n_slots
        parts = [
            (query[:, :, :n_slots], key, value),
            (query[:, :, n_slots:], key[:, :, tokens_see:], value[:, :, tokens_see:]),
        ]
        if is_gated:
            own = slice(n_slots, 2 * n_slots)
            parts.append((query[:, :, n_slots:], key[:, :, own], value[:, :, own]))
        return tuple(part.detach() for three in parts for part in three)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        n_slots, n_layers, width = ctx.n_slots, ctx.n_layers, ctx.width
        # read once, because checkpointing unpacks saved tensors a single time
        (seed,) = ctx.saved_tensors
        parts = [_without_heads(part) for part in gradients]
        slots, tokens, prefix = parts[:3], parts[3:6], parts[6:]
        n_rows, n_positions = len(slots[0]), n_slots + tokens[0].shape[1]
        grad_qkv = slots[0].new_empty(n_rows, n_positions, 3 * width)
        grad_prefix = slots[0].new_empty(n_layers, n_rows // n_layers * n_slots, 2 * width)
        chunks = n_chunks(n_layers, n_rows // n_layers * n_positions, grad_qkv.device)
        # gradients of both biases, concatenated
        sums = grad_qkv.new_empty(chunks, n_layers * 5 * width, dtype=torch.float32)
        for number in range(3):
            three = slots[number], tokens[number], prefix[number] if ctx.is_gated else tokens[number]
            _gather[(n_layers * chunks,)](
                *(given for part in three for given in (part, *part.stride()[:2])),
                seed if ctx.p else sums, grad_qkv, grad_prefix, sums,
                n_layers, n_rows // n_layers, chunks, n_positions, n_slots, number, width, ctx.p,
                IS_QUERY=number == 0, IS_GATED=ctx.is_gated, HAS_DROPOUT=ctx.p > 0,
                BLOCK=triton.next_power_of_2(width),
            )  # fmt: skip
        grad_biases = add_up(sums, ctx.bias_type).split((n_layers * 3 * width, n_layers * 2 * width))
        grad_bias, grad_prefix_bias = (part.view(n_layers, 1, -1) for part in grad_biases)
        return grad_qkv, grad_bias, grad_prefix, grad_prefix_bias, None, None, None


def _without_heads(gradient: Tensor) -> Tensor:
    """Reshape `(R, H, A, K)` to `(R, A, D)`; a view for the layout that attention on a GPU returns."""
    rows = gradient.transpose(1, 2).flatten(2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def _split(
    qkv, bias, prefix, prefix_bias, seed, query, key, value, n_documents, n_positions, n_slots, width, p,
    HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # position among the keys, where the prefix follows the slots
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    layer = row // n_documents
    target = (row * (n_positions + n_slots) + place) * width + column
    if (place >= n_slots) & (place < 2 * n_slots):
        source = (row * n_slots + place - n_slots) * 2
        for number in tl.static_range(2):
            summed = tl.load(prefix + (source + number) * width + column, inside, 0.0).to(tl.float32)
            summed += tl.load(prefix_bias + (layer * 2 + number) * width + column, inside, 0.0).to(tl.float32)
            if HAS_DROPOUT:
                summed = drop(summed, seed, source + number, p, BLOCK)
            if number == 0:
                tl.store(key + target, summed.to(key.dtype.element_ty), inside)
            else:
                tl.store(value + target, summed.to(value.dtype.element_ty), inside)
    else:
        position = tl.where(place < n_slots, place, place - n_slots)
        source = (row * n_positions + position) * 3
        for number in tl.static_range(3):
            summed = tl.load(qkv + (source + number) * width + column, inside, 0.0).to(tl.float32)
            summed += tl.load(bias + (layer * 3 + number) * width + column, inside, 0.0).to(tl.float32)
            if number == 0:
                own = (row * n_positions + position) * width + column
                tl.store(query + own, summed.to(query.dtype.element_ty), inside)
            if number == 1:
                tl.store(key + target, summed.to(key.dtype.element_ty), inside)
            if number == 2:
                tl.store(value + target, summed.to(value.dtype.element_ty), inside)


@triton.jit
def _gather(
    slots, slots_row, slots_place, tokens, tokens_row, tokens_place, prefix, prefix_row, prefix_place,
    seed, grad_qkv, grad_prefix, sums, n_layers, n_documents, n_chunks, n_positions, n_slots, number, width, p,
    IS_QUERY: tl.constexpr, IS_GATED: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    prefix_total = tl.zeros([BLOCK], dtype=tl.float32)
    # position of the first token's gradient
    n_places, first = n_positions, n_slots
    if not IS_QUERY:
        n_places = n_positions + n_slots
        if IS_GATED:
            first = 2 * n_slots
    for own in range(chunk, n_documents * n_places, n_chunks):
        row, place = layer.to(tl.int64) * n_documents + own // n_places, own % n_places
        is_prefix = (place >= n_slots) & (place < 2 * n_slots)
        of_tokens = tokens + row * tokens_row + (place - first) * tokens_place + column
        leaving = tl.load(of_tokens, inside & (place >= first), 0.0).to(tl.float32)
        of_slots = slots + row * slots_row + place * slots_place + column
        of_prefix = prefix + row * prefix_row + (place - n_slots) * prefix_place + column
        if IS_QUERY:
            leaving += tl.load(of_slots, inside & (place < n_slots), 0.0).to(tl.float32)
            if IS_GATED:
                leaving += tl.load(of_prefix, inside & (place >= n_slots), 0.0).to(tl.float32)
            target = (row * n_positions + place) * 3
            tl.store(grad_qkv + target * width + column, leaving.to(grad_qkv.dtype.element_ty), inside)
            total += leaving
        else:
            leaving += tl.load(of_slots, inside, 0.0).to(tl.float32)
            if IS_GATED:
                leaving += tl.load(of_prefix, inside & is_prefix, 0.0).to(tl.float32)
            if is_prefix:
                target = (row * n_slots + place - n_slots) * 2 + number - 1
                if HAS_DROPOUT:
                    leaving = drop(leaving, seed, target, p, BLOCK)
                tl.store(grad_prefix + target * width + column, leaving.to(grad_prefix.dtype.element_ty), inside)
                prefix_total += leaving
            else:
                target = (row * n_positions + tl.where(place < n_slots, place, place - n_slots)) * 3 + number
                tl.store(grad_qkv + target * width + column, leaving.to(grad_qkv.dtype.element_ty), inside)
                total += leaving
    sums += chunk * n_layers * 5 * width + column
    tl.store(sums + (layer * 3 + number) * width, total, inside)
    if not IS_QUERY:
        tl.store(sums + ((n_layers * 3 + layer * 2) + number - 1) * width, prefix_total, inside)
