"""Fused kernel that computes bias, dropout, residual sum and layer norm."""

# Shape suffixes: B documents, E encoder layers (of a diagonal), M rows of a layer: documents * positions, P prefix
# length (= slots), D model width.

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


def residual_norm(
    stream_EMD: Tensor, hidden_EMD: Tensor, hidden_bias: Tensor, weight: Tensor, bias: Tensor, epsilon: float, p: float
) -> Tensor:
    """Return `LayerNorm(stream + dropout(hidden + hidden_bias))`; biases and weight are `(E, 1, D)`.

    Sums are in float32; the output has the stream's dtype.
    """
    is_kept = torch.is_grad_enabled()
    place = 1, 0, None, None
    return _ResidualNorm.apply(stream_EMD, hidden_EMD, hidden_bias, weight, bias, epsilon, p, *place, is_kept, False)


def residual_norm_and_sum(
    stream_EMD: Tensor, hidden_EMD: Tensor, hidden_bias: Tensor, weight: Tensor, bias: Tensor, epsilon: float, p: float
) -> tuple[Tensor, Tensor]:
    """Return the result of `residual_norm` and the sum `stream + dropout(hidden + hidden_bias)`, for MBart's layers."""
    is_kept = torch.is_grad_enabled()
    place = 1, 0, None, None
    return _ResidualNorm.apply(stream_EMD, hidden_EMD, hidden_bias, weight, bias, epsilon, p, *place, is_kept, True)


def norm_with_input(stream_EMD: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `LayerNorm(stream)` and the unchanged stream; the backward pass adds both gradients in one kernel."""
    is_kept = torch.is_grad_enabled()
    place = 1, 0, None, None
    return _ResidualNorm.apply(stream_EMD, None, None, weight, bias, epsilon, 0.0, *place, is_kept, True)


def residual_norm_and_slots(
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
    """Return the result of `residual_norm`, and the slots of each document, which get a separate gradient.

    Slots are the first P positions, `(E, B, P, D)`. With the state `memory` `(E, B * P, D)`, the second output is the
    concatenation of state and slots, `(E, B * P, 2 * D)`. `out` is a buffer for the first output, without autograd.
    """
    is_kept = torch.is_grad_enabled()
    place = n_documents, n_slots, memory, out
    return _ResidualNorm.apply(stream_EMD, hidden_EMD, hidden_bias, weight, bias, epsilon, p, *place, is_kept, False)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        hidden: Tensor | None,
        hidden_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        p: float,
        n_documents: int,
        n_slots: int,
        memory: Tensor | None,
        out: Tensor | None,
        is_kept: bool,
        gives_sum: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        n_layers, n_rows, width = stream.shape
        stream, has_hidden = stream.contiguous(), hidden is not None
        out = torch.empty_like(stream) if out is None else out
        # sum, saved for the backward pass
        total = stream
        if has_hidden:
            total = torch.empty_like(stream) if is_kept or gives_sum else out
        mean, scale = stream.new_empty(2, n_layers * n_rows if is_kept else 0, dtype=torch.float32)
        seed = draw_seed(stream.device) if p else mean
        has_memory, n_positions = memory is not None, n_rows // n_documents
        both = stream.new_empty(n_layers, n_documents * n_slots, 2 * width) if has_memory else out
        _forward[(n_layers * n_rows,)](
            stream, hidden.contiguous() if has_hidden else stream, hidden_bias if has_hidden else bias,
            weight, bias, seed, memory.contiguous() if has_memory else out,
            total, out, both, mean, scale, n_rows, n_positions, n_slots, width, epsilon, p,
            IS_KEPT=is_kept, GIVES_SUM=gives_sum, HAS_HIDDEN=has_hidden, HAS_MEMORY=has_memory, HAS_DROPOUT=p > 0,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, mean, scale, seed)
        ctx.p, ctx.n_documents, ctx.n_slots, ctx.has_memory = p, n_documents, n_slots, has_memory
        ctx.gives_sum, ctx.has_hidden = gives_sum, has_hidden
        if gives_sum:
            return out, total
        if not n_slots:
            return out
        return out, both if has_memory else out.unflatten(1, (n_documents, -1))[:, :, :n_slots].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight, mean, scale, seed = ctx.saved_tensors
        n_layers, n_rows, width = total.shape
        chunks = n_chunks(n_layers, n_rows, total.device)
        grad_stream = torch.empty_like(total)
        grad_hidden = torch.empty_like(total) if ctx.p else grad_stream
        # gradients of the bias, the weight and, if there is one, the hidden bias
        sums = total.new_empty(chunks, 2 + ctx.has_hidden, n_layers, 1, width, dtype=torch.float32)
        # `beside` is the gradient of the sum or of the slots
        grad_sum = beside.contiguous() if ctx.gives_sum else total
        grad_memory, slots = None, total.unsqueeze(1) if beside is None or ctx.gives_sum else beside
        slots = slots if slots.stride(-1) == 1 else slots.contiguous()
        if ctx.has_memory:
            grad_memory, slots = slots.chunk(2, dim=-1)
            slots = slots.unflatten(1, (ctx.n_documents, -1))
        _backward[(n_layers * chunks,)](
            gradient.contiguous(), grad_sum, slots, *slots.stride()[:3], total, weight, mean, scale, seed,
            grad_stream, grad_hidden, sums,
            n_layers, n_rows, chunks, n_rows // ctx.n_documents, ctx.n_slots, width, ctx.p,
            GIVES_SUM=ctx.gives_sum, HAS_HIDDEN=ctx.has_hidden, HAS_SLOTS=ctx.n_slots > 0, HAS_DROPOUT=ctx.p > 0,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        grad_bias, grad_weight, *grad_hidden_bias = add_up(sums, weight.dtype)
        of_hidden = (grad_hidden, *grad_hidden_bias) if ctx.has_hidden else (None, None)
        return (grad_stream, *of_hidden, grad_weight, grad_bias, *[None] * 4, grad_memory, None, None, None)


@triton.jit
def _forward(
    stream, hidden, hidden_bias, weight, bias, seed, memory, total, out, both, mean, scale,
    n_rows, n_positions, n_slots, width, epsilon, p,
    IS_KEPT: tl.constexpr, GIVES_SUM: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place, own = row * width + column, (row // n_rows) * width + column
    summed = tl.load(stream + place, inside, 0.0).to(tl.float32)
    if HAS_HIDDEN:
        added = tl.load(hidden + place, inside, 0.0).to(tl.float32)
        added += tl.load(hidden_bias + own, inside, 0.0).to(tl.float32)
        if HAS_DROPOUT:
            added = drop(added, seed, row, p, BLOCK)
        # rounded as the backward pass will read it
        rounded = (summed + added).to(total.dtype.element_ty)
        if IS_KEPT or GIVES_SUM:
            tl.store(total + place, rounded, inside)
        summed = rounded.to(tl.float32)
    standardized, average, factor = standardize(summed, inside, width, epsilon)
    if IS_KEPT:
        tl.store(mean + row, average)
        tl.store(scale + row, factor)
    normed = standardized * tl.load(weight + own, inside, 0.0).to(tl.float32)
    normed += tl.load(bias + own, inside, 0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), inside)
    if HAS_MEMORY:
        slot = row // n_positions * n_slots + row % n_positions
        is_slot = inside & (row % n_positions < n_slots)
        tl.store(both + slot * 2 * width + column, tl.load(memory + slot * width + column, is_slot, 0.0), is_slot)
        tl.store(both + (slot * 2 + 1) * width + column, normed.to(both.dtype.element_ty), is_slot)


@triton.jit
def _backward(
    gradient, grad_sum, slots, slots_layer, slots_document, slots_position, total, weight, mean, scale, seed,
    grad_stream, grad_hidden, sums, n_layers, n_rows, n_chunks, n_positions, n_slots, width, p,
    GIVES_SUM: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
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
        factor = tl.load(scale + row)
        arriving = tl.load(gradient + place, inside, 0.0).to(tl.float32)
        if HAS_SLOTS:
            document, position = own_row // n_positions, own_row % n_positions
            here = slots + layer.to(tl.int64) * slots_layer + document * slots_document + position * slots_position
            arriving += tl.load(here + column, inside & (position < n_slots), 0.0).to(tl.float32)
        normed = (tl.load(total + place, inside, 0.0).to(tl.float32) - tl.load(mean + row)) * factor
        normed = tl.where(inside, normed, 0.0)
        bias_sum += arriving
        weight_sum += arriving * normed
        leaving = standardize_gradient(arriving * own_weight, normed, factor, width)
        if GIVES_SUM:
            leaving += tl.load(grad_sum + place, inside, 0.0).to(tl.float32)
        tl.store(grad_stream + place, leaving.to(grad_stream.dtype.element_ty), inside)
        if HAS_DROPOUT:
            leaving = drop(leaving, seed, row, p, BLOCK)
            tl.store(grad_hidden + place, leaving.to(grad_hidden.dtype.element_ty), inside)
        hidden_sum += leaving
    stride = n_layers * width
    place = chunk * (2 + HAS_HIDDEN) * stride + layer * width + column
    tl.store(sums + place, bias_sum, inside)
    tl.store(sums + stride + place, weight_sum, inside)
    if HAS_HIDDEN:
        tl.store(sums + 2 * stride + place, hidden_sum, inside)
