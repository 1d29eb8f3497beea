"""Fused kernel that computes bias, dropout and residual sum at the end of MBart's layers, and the norm of the slots."""

# Slots are the first P positions of a document, which write the state.
# Shape suffixes: B documents, E encoder layers (of a diagonal), M rows of a layer: documents * positions, P number of
# slots, D model width.

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from recurrent_bart.execution.kernels.programs import (
    add_up,
    draw_seed,
    drop,
    n_chunks,
    standardize,
    standardize_gradient,
)
from recurrent_bart.recurrence.cell import largest_stream


def residual_sum_and_slots(
    stream_EMD: Tensor,
    hidden_EMD: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    p: float,
    n_documents: int,
    n_slots: int,
    memory: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `within_range(stream + dropout(hidden + hidden_bias))`, and the layer norm of its slots, `(E, B, P, D)`.

    Biases and weight are `(E, 1, D)`; weight and bias belong to the norm. With the state `memory` `(E, B * P, D)`, the
    second output is the concatenation of state and normed slots, `(E, B * P, 2 * D)`. Sums are in float32; outputs have
    the stream's dtype. `out` is a buffer for the first output, without autograd.
    """
    sizes = n_documents, n_slots
    return _ResidualSum.apply(stream_EMD, hidden_EMD, hidden_bias, weight, bias, epsilon, p, *sizes, memory, out)


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        hidden: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        p: float,
        n_documents: int,
        n_slots: int,
        memory: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n_layers, n_rows, width = stream.shape
        out = torch.empty_like(stream, memory_format=torch.contiguous_format) if out is None else out
        n_parts, bound = 1 if memory is None else 2, largest_stream(stream.dtype)
        slots = stream.new_empty(n_layers, n_documents * n_slots, n_parts * width)
        # slots before the norm, saved for the backward pass
        sums = stream.new_empty(n_layers, n_documents * n_slots, width)
        seed = draw_seed(stream.device) if p else sums
        _forward[(n_layers * n_rows,)](
            stream.contiguous(), hidden.contiguous(), hidden_bias, weight, bias, seed,
            sums if memory is None else memory.contiguous(), out, sums, slots,
            n_rows, n_rows // n_documents, n_slots, width, epsilon, p, bound or 0.0,
            IS_BOUNDED=bound is not None, N_PARTS=n_parts, HAS_DROPOUT=p > 0, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(sums, weight, seed, sums if bound is None else out)
        ctx.epsilon, ctx.p, ctx.bound, ctx.n_parts = epsilon, p, bound, n_parts
        ctx.n_documents, ctx.n_slots = n_documents, n_slots
        return out, slots if n_parts > 1 else slots.unflatten(1, (n_documents, n_slots))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, grad_slots: Tensor) -> tuple[Tensor | None, ...]:
        slots, weight, seed, total = ctx.saved_tensors
        gradient = gradient.contiguous()
        n_layers, n_rows, width = gradient.shape
        chunks = n_chunks(n_layers, n_rows, gradient.device)
        grad_stream = torch.empty_like(gradient)
        grad_hidden = torch.empty_like(gradient) if ctx.p else grad_stream
        # gradients of the bias, the weight and the hidden bias
        sums = gradient.new_empty(chunks, 3, n_layers, 1, width, dtype=torch.float32)
        _backward[(n_layers * chunks,)](
            gradient, grad_slots.contiguous(), slots, weight, seed, total, grad_stream, grad_hidden, sums,
            n_layers, n_rows, chunks, n_rows // ctx.n_documents, ctx.n_slots, width, ctx.epsilon, ctx.p,
            ctx.bound or 0.0, IS_BOUNDED=ctx.bound is not None, N_PARTS=ctx.n_parts, HAS_DROPOUT=ctx.p > 0,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        grad_memory = grad_slots[..., :width] if ctx.n_parts > 1 else None
        grad_bias, grad_weight, grad_hidden_bias = add_up(sums, weight.dtype)
        return grad_stream, grad_hidden, grad_hidden_bias, grad_weight, grad_bias, *[None] * 4, grad_memory, None


@triton.jit
def _forward(
    stream, hidden, hidden_bias, weight, bias, seed, memory, out, sums, slots,
    n_rows, n_positions, n_slots, width, epsilon, p, bound,
    IS_BOUNDED: tl.constexpr, N_PARTS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place, own = row * width + column, (row // n_rows) * width + column
    summed = tl.load(hidden + place, inside, 0.0).to(tl.float32)
    summed += tl.load(hidden_bias + own, inside, 0.0).to(tl.float32)
    if HAS_DROPOUT:
        summed = drop(summed, seed, row, p, BLOCK)
    summed += tl.load(stream + place, inside, 0.0).to(tl.float32)
    if IS_BOUNDED:
        # keeps NaN, unlike minimum and maximum
        summed = tl.where(summed > bound, bound, tl.where(summed < -bound, -bound, summed))
    rounded = summed.to(out.dtype.element_ty)
    tl.store(out + place, rounded, inside)
    if row % n_positions < n_slots:
        slot = row // n_positions * n_slots + row % n_positions
        tl.store(sums + slot * width + column, rounded, inside)
        normed, _, _ = standardize(rounded.to(tl.float32), inside, width, epsilon)
        normed = normed * tl.load(weight + own, inside, 0.0).to(tl.float32)
        normed += tl.load(bias + own, inside, 0.0).to(tl.float32)
        beside = slots + slot * N_PARTS * width + column
        if N_PARTS > 1:
            tl.store(beside, tl.load(memory + slot * width + column, inside, 0.0), inside)
        tl.store(beside + (N_PARTS - 1) * width, normed.to(slots.dtype.element_ty), inside)


@triton.jit
def _backward(
    gradient, grad_slots, slots, weight, seed, total, grad_stream, grad_hidden, sums,
    n_layers, n_rows, n_chunks, n_positions, n_slots, width, epsilon, p, bound,
    IS_BOUNDED: tl.constexpr, N_PARTS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    own_weight = tl.load(weight + layer * width + column, inside, 0.0).to(tl.float32)
    bias_sum = tl.zeros([BLOCK], dtype=tl.float32)
    weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
    hidden_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for own_row in range(chunk, n_rows, n_chunks):
        row = layer.to(tl.int64) * n_rows + own_row
        place = row * width + column
        leaving = tl.load(gradient + place, inside, 0.0).to(tl.float32)
        if row % n_positions < n_slots:
            slot = row // n_positions * n_slots + row % n_positions
            arriving = tl.load(grad_slots + (slot * N_PARTS + N_PARTS - 1) * width + column, inside, 0.0).to(tl.float32)
            value = tl.load(slots + slot * width + column, inside, 0.0).to(tl.float32)
            standardized, _, factor = standardize(value, inside, width, epsilon)
            bias_sum += arriving
            weight_sum += arriving * standardized
            leaving += standardize_gradient(arriving * own_weight, standardized, factor, width)
        if IS_BOUNDED:
            is_inside = tl.abs(tl.load(total + place, inside, 0.0).to(tl.float32)) <= bound
            leaving = tl.where(is_inside, leaving, 0.0)
        tl.store(grad_stream + place, leaving.to(grad_stream.dtype.element_ty), inside)
        if HAS_DROPOUT:
            leaving = drop(leaving, seed, row, p, BLOCK)
            tl.store(grad_hidden + place, leaving.to(grad_hidden.dtype.element_ty), inside)
        hidden_sum += leaving
    stride = n_layers * width
    place = chunk * 3 * stride + layer * width + column
    tl.store(sums + place, bias_sum, inside)
    tl.store(sums + stride + place, weight_sum, inside)
    tl.store(sums + 2 * stride + place, hidden_sum, inside)
