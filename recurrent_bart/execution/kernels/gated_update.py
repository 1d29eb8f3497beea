"""Fused kernel that updates the state through a gate, after the gate's matrix product."""

# Slots are the positions of an encoder layer that write the state.
# Shape suffixes: B documents, E encoder layers (of a diagonal), M rows of a layer: documents * slots, D model width,
# X = 2 * D.

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

from recurrent_bart.execution.kernels.programs import add_up, n_chunks


def gated_update(
    gate_EMD: Tensor, gate_bias: Tensor, both_EMX: Tensor, is_read_EB: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Return `memory + sigmoid(gate + gate_bias) * (slots - memory)`, computed in float32.

    `gate_EMD` is the gate's matrix product; `gate_bias` is `(E, 1, D)`. `both_EMX` is the concatenation of state and
    slots, `(E, M, 2 * D)`. If `is_read_EB` is False, the document has no text in the layer's segment, so its state
    stays unchanged; None means that all documents have text. `out` is an output buffer, without autograd.
    """
    return _GatedUpdate.apply(gate_EMD, gate_bias, both_EMX, is_read_EB, out)


class _GatedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, gate_bias: Tensor, both: Tensor, is_read: Tensor | None, out: Tensor | None
    ) -> Tensor:
        n_layers, n_rows, width = gate.shape
        gate, gate_bias, both = gate.contiguous(), gate_bias.contiguous(), both.contiguous()
        n_slots = 0 if is_read is None else n_layers * n_rows // is_read.numel()
        # any tensor: the kernel does not read it
        is_read = gate_bias if is_read is None else is_read.contiguous().view(torch.uint8)
        out = torch.empty_like(gate) if out is None else out
        _forward[(n_layers * n_rows,)](
            gate, gate_bias, both, is_read, out,
            n_rows, n_slots, width, MAY_REST=n_slots > 0, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(gate, gate_bias, both, is_read)
        ctx.n_slots = n_slots
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_bias, both, is_read = ctx.saved_tensors
        n_layers, n_rows, width = gate.shape
        chunks = n_chunks(n_layers, n_rows, gate.device)
        grad_gate, grad_both = torch.empty_like(gate), torch.empty_like(both)
        sums = gate.new_empty(chunks, n_layers, 1, width, dtype=torch.float32)
        _backward[(n_layers * chunks,)](
            gradient.contiguous(), gate, gate_bias, both, is_read, grad_gate, grad_both, sums,
            n_layers, n_rows, chunks, ctx.n_slots, width,
            MAY_REST=ctx.n_slots > 0, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return grad_gate, add_up(sums, gate_bias.dtype), grad_both, None, None


@triton.jit
def _forward(
    gate, gate_bias, both, is_read, out, n_rows, n_slots, width, MAY_REST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    offset = row * width + column
    memory = tl.load(both + row * 2 * width + column, inside, 0.0).to(tl.float32)
    slots = tl.load(both + (row * 2 + 1) * width + column, inside, 0.0).to(tl.float32)
    opening = tl.load(gate + offset, inside, 0.0).to(tl.float32)
    opening += tl.load(gate_bias + (row // n_rows) * width + column, inside, 0.0).to(tl.float32)
    new = memory + tl.sigmoid(opening) * (slots - memory)
    if MAY_REST:
        new = tl.where(tl.load(is_read + row // n_slots) != 0, new, memory)
    tl.store(out + offset, new.to(out.dtype.element_ty), inside)


@triton.jit
def _backward(
    gradient, gate, gate_bias, both, is_read, grad_gate, grad_both, sums,
    n_layers, n_rows, n_chunks, n_slots, width, MAY_REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, chunk = tl.program_id(0) // n_chunks, tl.program_id(0) % n_chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    added = tl.load(gate_bias + layer * width + column, inside, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for own_row in range(chunk, n_rows, n_chunks):
        row = layer.to(tl.int64) * n_rows + own_row
        offset, beside = row * width + column, row * 2 * width + column
        memory = tl.load(both + beside, inside, 0.0).to(tl.float32)
        slots = tl.load(both + beside + width, inside, 0.0).to(tl.float32)
        opening = tl.sigmoid(tl.load(gate + offset, inside, 0.0).to(tl.float32) + added)
        if MAY_REST:
            opening = tl.where(tl.load(is_read + row // n_slots) != 0, opening, 0.0)
        arriving = tl.load(gradient + offset, inside, 0.0).to(tl.float32)
        leaving = arriving * (slots - memory) * opening * (1.0 - opening)
        tl.store(grad_gate + offset, leaving.to(grad_gate.dtype.element_ty), inside)
        tl.store(grad_both + beside, (arriving * (1.0 - opening)).to(grad_both.dtype.element_ty), inside)
        tl.store(grad_both + beside + width, (arriving * opening).to(grad_both.dtype.element_ty), inside)
        total += leaving
    tl.store(sums + (chunk * n_layers + layer) * width + column, total, inside)
