"""Fused kernel that adds a bias and applies GELU or tanh."""

# Shape suffixes: E encoder layers (of a diagonal), M rows of a layer, F inner width of the feed-forward block or of the
# prefix projection.

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from recurrent_bart.execution.kernels.programs import add_up, n_chunks

# size of a program's tile
ROWS, COLUMNS = 8, 256


def bias_gelu(hidden_EMF: Tensor, bias: Tensor) -> Tensor:
    """Return `gelu(hidden + bias)`, exact GELU in float32; `bias` is `(E, 1, F)`."""
    return _BiasActivation.apply(hidden_EMF, bias, False)


def bias_tanh(hidden_EMF: Tensor, bias: Tensor) -> Tensor:
    """Return `tanh(hidden + bias)`, computed in float32; `bias` is `(E, 1, F)`."""
    return _BiasActivation.apply(hidden_EMF, bias, True)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor, is_tanh: bool) -> Tensor:
        n_layers, n_rows, width = hidden.shape
        out = torch.empty_like(hidden)
        grid = (n_layers * triton.cdiv(n_rows, ROWS), triton.cdiv(width, COLUMNS))
        _forward[grid](hidden, bias, out, n_rows, width, IS_TANH=is_tanh, ROWS=ROWS, COLUMNS=COLUMNS)
        ctx.save_for_backward(hidden, bias)
        ctx.is_tanh = is_tanh
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, bias = ctx.saved_tensors
        n_layers, n_rows, width = hidden.shape
        chunks = n_chunks(n_layers, triton.cdiv(n_rows, ROWS), hidden.device)
        grad_hidden = torch.empty_like(hidden)
        sums = hidden.new_empty(chunks, n_layers, 1, width, dtype=torch.float32)
        grid = (n_layers * chunks, triton.cdiv(width, COLUMNS))
        _backward[grid](
            gradient.contiguous(), hidden, bias, grad_hidden, sums,
            n_layers, n_rows, chunks, width, IS_TANH=ctx.is_tanh, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        return grad_hidden, add_up(sums, bias.dtype), None


@triton.jit
def _forward(
    hidden, bias, out, n_rows, width, IS_TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(n_rows, ROWS)
    layer, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (column < width)
    offset = (layer.to(tl.int64) * n_rows + row) * width + column
    value = tl.load(hidden + offset, inside, 0.0).to(tl.float32)
    value += tl.load(bias + layer * width + column, column < width, 0.0).to(tl.float32)
    if IS_TANH:
        active = 2.0 * tl.sigmoid(2.0 * value) - 1.0
    else:
        active = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(out + offset, active.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(
    gradient, hidden, bias, grad_hidden, sums,
    n_layers, n_rows, n_chunks, width, IS_TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    layer, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    added = tl.load(bias + layer * width + column, column < width, 0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(chunk * ROWS, n_rows, n_chunks * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (column < width)
        offset = (layer.to(tl.int64) * n_rows + row) * width + column
        value = tl.load(hidden + offset, inside, 0.0).to(tl.float32) + added
        if IS_TANH:
            active = 2.0 * tl.sigmoid(2.0 * value) - 1.0
            slope = 1.0 - active * active
        else:
            share = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
            slope = share + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        leaving = tl.load(gradient + offset, inside, 0.0).to(tl.float32) * slope
        tl.store(grad_hidden + offset, leaving.to(grad_hidden.dtype.element_ty), inside)
        total += leaving
    offset = (chunk * n_layers + layer) * width + column
    tl.store(sums + offset, tl.sum(total, axis=0)[None, :], column < width)
