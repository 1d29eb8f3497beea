"""What stands between matrix products and attention: queries, keys and values for all that reads, and what was read.

A cell's keys are `slots, prefix, tokens`, one behind the other, so that slots see all of them, and tokens and the
prefix's own softmax a part, without a copy.

Shape suffixes: E encoder layers (of a diagonal), R = layers * documents, S = slots and tokens of a segment, P prefix
length (= slots), A attended length, H heads, K head width, D model width.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from recurrent_bart.kernels.programs import n_chunks


class Heads(NamedTuple):
    """Queries `(R, H, Q, K)`, and keys and values `(R, H, A, K)`, for each attention of a cell.

    Each has a gradient of its own, though they are views of the same numbers. With one softmax over prefix and tokens,
    `tokens_key` and `tokens_value` begin with the prefix and the last three are None.
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


def split_heads(qkv_RSX: Tensor, bias: Tensor, prefix_key: Tensor, prefix_value: Tensor, is_gated: bool) -> Heads:
    """Add the bias and lay out heads.

    Args:
        qkv_RSX: Queries, keys and values `(R, S, 3 * D)` without their bias, slots in front of tokens.
        bias: Of each layer, `(E, 1, 3 * D)`.
        prefix_key: `(R, H, P, K)`.
        prefix_value: Likewise.
        is_gated: Whether the prefix has a softmax of its own.
    """
    return Heads(*_SplitHeads.apply(qkv_RSX, bias, prefix_key, prefix_value, is_gated))


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, prefix_key: Tensor, prefix_value: Tensor, is_gated: bool
    ) -> tuple[Tensor, ...]:
        n_rows, n_positions, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        _, n_heads, n_slots, head_dim = prefix_key.shape
        query = qkv.new_empty(n_rows, n_positions, n_heads, head_dim)
        key, value = qkv.new_empty(2, n_rows, n_positions + n_slots, n_heads, head_dim)
        _split[(n_rows, n_positions)](
            qkv.contiguous(), bias, query, key, value,
            n_rows // len(bias), n_positions, n_slots, width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        for all_parts, prefix in ((key, prefix_key), (value, prefix_value)):
            all_parts[:, n_slots : 2 * n_slots].copy_(prefix.transpose(1, 2))
        ctx.is_gated, ctx.n_slots, ctx.bias, ctx.width = is_gated, n_slots, (bias.shape, bias.dtype), width
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
        n_slots, is_gated, (bias_shape, dtype) = ctx.n_slots, ctx.is_gated, ctx.bias
        parts = [part if part.stride(-1) == 1 else part.contiguous() for part in gradients]
        slots, tokens, prefix = parts[:3], parts[3:6], parts[6:]
        n_rows, _, _, head_dim = slots[0].shape
        n_positions, n_layers = n_slots + tokens[0].shape[2], bias_shape[0]
        into_qkv = slots[0].new_empty(n_rows, n_positions, 3 * ctx.width)
        rows = n_rows // n_layers * n_positions
        chunks = n_chunks(n_layers, rows, into_qkv.device)
        sums = into_qkv.new_empty(chunks, n_layers, 3 * ctx.width, dtype=torch.float32)
        for number in range(3):
            own, others = slots[number], [tokens[number]]
            # keys of tokens stand behind slots and prefix, and, with one softmax, behind the prefix
            skipped, skipped_too = (0, 0) if number == 0 else (n_slots, 0 if is_gated else n_slots)
            others += [prefix[0] if number == 0 and is_gated else tokens[number]]
            _gather[(n_layers * chunks,)](
                own, *own.stride()[:3], others[0], *others[0].stride()[:3], others[1], *others[1].stride()[:3],
                into_qkv, sums, n_layers, rows, chunks, n_positions, n_slots, skipped, skipped_too,
                number, ctx.width, head_dim,
                IS_QUERY=number == 0, IS_GATED=is_gated, BLOCK=triton.next_power_of_2(ctx.width),
            )  # fmt: skip
        into_prefix = [
            all_parts[:, :, n_slots : 2 * n_slots] + (prefix[number] if is_gated else tokens[number][:, :, :n_slots])
            for number, all_parts in enumerate(slots)
            if number
        ]
        return into_qkv, sums.sum(dim=0).view(bias_shape).to(dtype), *into_prefix, None


@triton.jit
def _split(
    qkv, bias, query, key, value, n_documents, n_positions, n_slots, width, BLOCK: tl.constexpr
):  # fmt: skip
    row, position = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = (row * n_positions + position) * 3 * width + column
    own = (row // n_documents) * 3 * width + column
    # behind the slots stands the prefix
    behind = tl.where(position < n_slots, position, position + n_slots)
    target = (row * (n_positions + n_slots) + behind) * width + column
    for number in tl.static_range(3):
        summed = tl.load(qkv + source + number * width, inside, 0.0).to(tl.float32)
        summed += tl.load(bias + own + number * width, inside, 0.0).to(tl.float32)
        summed = summed.to(query.dtype.element_ty)
        if number == 0:
            tl.store(query + (row * n_positions + position) * width + column, summed, inside)
        if number == 1:
            tl.store(key + target, summed, inside)
        if number == 2:
            tl.store(value + target, summed, inside)


@triton.jit
def _gather(
    slots, slots_row, slots_head, slots_position, tokens, tokens_row, tokens_head, tokens_position,
    prefix, prefix_row, prefix_head, prefix_position, into_qkv, sums,
    n_layers, n_rows, n_chunks, n_positions, n_slots, skipped, skipped_too, number, width, head_dim,
    IS_QUERY: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    head, within = column // head_dim, column % head_dim
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for own_row in range(chunk, n_rows, n_chunks):
        place = layer.to(tl.int64) * n_rows + own_row
        row, position = place // n_positions, place % n_positions
        if position < n_slots:
            here = slots + row * slots_row + position * slots_position + head * slots_head + within
            leaving = tl.load(here, inside, 0.0).to(tl.float32)
        else:
            token = position - n_slots
            here = tokens + row * tokens_row + (token + skipped_too) * tokens_position + head * tokens_head + within
            leaving = tl.load(here, inside, 0.0).to(tl.float32)
            if not IS_QUERY:
                here = slots + row * slots_row + (position + skipped) * slots_position + head * slots_head + within
                leaving += tl.load(here, inside, 0.0).to(tl.float32)
            elif IS_GATED:
                here = prefix + row * prefix_row + token * prefix_position + head * prefix_head + within
                leaving += tl.load(here, inside, 0.0).to(tl.float32)
        total += leaving
        target = into_qkv + (place * 3 + number) * width + column
        tl.store(target, leaving.to(into_qkv.dtype.element_ty), inside)
    tl.store(sums + (chunk * n_layers + layer) * 3 * width + number * width + column, total, inside)
