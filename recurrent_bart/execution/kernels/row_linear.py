"""Fused linear maps for few input rows.

Variants: followed by GELU; with partial sums in float32; followed by the residual sum and the norm.

The products that PyTorch chooses for few rows wait for memory. These read each weight once, by all of the GPU, and
begin before the previous kernel ends.
Shape suffixes: R rows, N parts of the sum over the input width, D model width, F output width, I input width.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from recurrent_bart.execution.kernels.programs import early_start, gdc_launch_dependents, gdc_wait

# rows of the smallest tile of a matrix product, and the most rows that a program multiplies
LEAST_ROWS, MOST_ROWS = 16, 128


def linear_rows(rows_RI: Tensor, weight_FI: Tensor, bias_F: Tensor, has_gelu: bool = False) -> Tensor:
    """Return `rows @ weight.T + bias` in the dtype of the rows, through exact GELU with `has_gelu`."""
    out = rows_RI.new_empty(len(rows_RI), len(weight_FI))
    _launch(rows_RI, weight_FI, bias_F, out, n_parts=1, has_gelu=has_gelu)
    return out


def linear_scores(rows_RI: Tensor, weight_FI: Tensor, bias_F: Tensor) -> Tensor:
    """Return `rows @ weight.T + bias`, rounded to the dtype of the rows, in float32."""
    out = rows_RI.new_empty(len(rows_RI), len(weight_FI), dtype=torch.float32)
    _launch(rows_RI, weight_FI, bias_F, out, n_parts=1, is_wide=True)
    return out


def linear_parts(rows_RI: Tensor, weight_FI: Tensor, n_parts: int) -> Tensor:
    """Return float32 parts `(N, R, F)` whose sum is `rows @ weight.T`."""
    out = rows_RI.new_empty(n_parts, len(rows_RI), len(weight_FI), dtype=torch.float32)
    _launch(rows_RI, weight_FI, None, out, n_parts)
    return out


def _launch(
    rows_RI: Tensor,
    weight_FI: Tensor,
    bias_F: Tensor | None,
    out: Tensor,
    n_parts: int,
    has_gelu: bool = False,
    is_wide: bool = False,
) -> None:
    (n_rows, width), n_out = rows_RI.shape, len(weight_FI)
    rows = 1 if n_rows == 1 else max(LEAST_ROWS, min(MOST_ROWS, triton.next_power_of_2(n_rows)))
    columns, inner, n_warps, n_stages = tile(rows, width // n_parts, is_wide, n_parts > 1, rows_RI.element_size())
    part_width = triton.cdiv(triton.cdiv(width, n_parts), inner) * inner
    _linear[(triton.cdiv(n_out, columns), n_parts, triton.cdiv(n_rows, rows))](
        rows_RI, weight_FI, out if bias_F is None else bias_F, out, n_rows, n_out, width, part_width, rows_RI.stride(0),
        ROWS=rows, COLUMNS=columns, INNER=inner, HAS_BIAS=bias_F is not None, HAS_GELU=has_gelu,
        num_warps=n_warps, num_stages=n_stages, **early_start(out.device),
    )  # fmt: skip


def tile(rows: int, part_width: int, is_wide: bool, is_parted: bool, n_bytes: int) -> tuple[int, int, int, int]:
    """Return output columns and input columns of a program's tile, warps and pipeline stages.

    These were the fastest on an H200 for BART-large in bfloat16. Numbers of more bytes get smaller tiles, which fit.
    """
    if is_wide:
        found = (16, 256, 4, 3) if rows == 1 else (64, 128, 4, 4) if rows <= 32 else (64, 64, 4, 4)
    elif rows == 1 and is_parted:
        found = (32, 256, 4, 3) if part_width <= 256 else (16, 512, 4, 2)
    elif rows == 1:
        found = 8, 1024, 4, 1
    elif is_parted or rows > 32:
        # 128 rows of 128 numbers in four stages do not fit on every GPU
        found = 32, 128 if rows <= 64 else 64, 4, 4
    else:
        found = 16, 256, 2, 4
    columns, inner, n_warps, n_stages = found
    return (columns, inner, n_warps, n_stages) if n_bytes <= 2 else (columns, max(16, inner // 4), n_warps, 2)


def add_and_norm(
    parts_NRD: Tensor,
    bias_D: Tensor,
    residual_RD: Tensor,
    weight_D: Tensor,
    norm_bias_D: Tensor,
    epsilon: float,
    gives_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the norm of `parts.sum(0) + bias + residual`, and the sum itself if `gives_sum`, else the norm again."""
    n_parts, n_rows, width = parts_NRD.shape
    normed = torch.empty_like(residual_RD)
    summed = torch.empty_like(residual_RD) if gives_sum else normed
    _add_and_norm[(n_rows,)](
        parts_NRD, bias_D, residual_RD, weight_D, norm_bias_D, normed, summed, n_parts, n_rows, width, epsilon,
        GIVES_SUM=gives_sum, PARTS=triton.next_power_of_2(n_parts), BLOCK=triton.next_power_of_2(width),
        **early_start(normed.device),
    )  # fmt: skip
    return normed, summed


@triton.jit
def _linear(
    rows, weight, bias, out, n_rows, n_out, width, part_width, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GELU: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    if ROWS == 1 and AHEAD:
        gdc_launch_dependents()
    part, block = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first_inner, end_inner = part * part_width, tl.minimum(width, (part + 1) * part_width)
    weights = weight + column.to(tl.int64)[:, None] * width
    row = block * ROWS + tl.arange(0, ROWS)
    inner = first_inner + tl.arange(0, INNER)
    inside = (column < n_out)[:, None] & (inner < end_inner)[None, :]
    # the weights do not depend on the previous kernel
    read = tl.load(weights + inner[None, :], inside, 0.0)
    if AHEAD:
        gdc_wait()
    if ROWS == 1:
        own = tl.load(rows + inner, inner < end_inner, 0.0).to(tl.float32)
        products = read.to(tl.float32) * own[None, :]
        for first in tl.range(first_inner + INNER, end_inner, INNER):
            inner = first + tl.arange(0, INNER)
            own = tl.load(rows + inner, inner < end_inner, 0.0).to(tl.float32)
            inside = (column < n_out)[:, None] & (inner < end_inner)[None, :]
            products += tl.load(weights + inner[None, :], inside, 0.0).to(tl.float32) * own[None, :]
        sums = tl.sum(products, axis=1)[None, :]
    else:
        is_own = (row < n_rows)[:, None] & (inner < end_inner)[None, :]
        own = tl.load(rows + row.to(tl.int64)[:, None] * row_stride + inner[None, :], is_own, 0.0)
        sums = tl.dot(own, read.T, input_precision="ieee")
        for first in tl.range(first_inner + INNER, end_inner, INNER):
            inner = first + tl.arange(0, INNER)
            is_own = (row < n_rows)[:, None] & (inner < end_inner)[None, :]
            own = tl.load(rows + row.to(tl.int64)[:, None] * row_stride + inner[None, :], is_own, 0.0)
            inside = (column < n_out)[:, None] & (inner < end_inner)[None, :]
            sums = tl.dot(own, tl.load(weights + inner[None, :], inside, 0.0).T, sums, input_precision="ieee")
    if ROWS > 1 and AHEAD:
        # not before: waiting programs would take room on the processors
        gdc_launch_dependents()
    inside = (row < n_rows)[:, None] & (column < n_out)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + column, column < n_out, 0.0).to(tl.float32)[None, :]
        # rounded as PyTorch's product is
        sums = sums.to(rows.dtype.element_ty).to(tl.float32)
    if HAS_GELU:
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    place = (part * n_rows + row).to(tl.int64)[:, None] * n_out + column[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), inside)


@triton.jit
def _add_and_norm(
    parts, bias, residual, weight, norm_bias, normed_out, summed_out, n_parts, n_rows, width, epsilon,
    GIVES_SUM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    summed = tl.load(bias + column, inside, 0.0).to(tl.float32)
    own_weight = tl.load(weight + column, inside, 0.0).to(tl.float32)
    own_bias = tl.load(norm_bias + column, inside, 0.0).to(tl.float32)
    if AHEAD:
        gdc_wait()
    part = tl.arange(0, PARTS)[:, None]
    whole = tl.load(parts + part * n_rows * width + place[None, :], (part < n_parts) & inside[None, :], 0.0)
    summed += tl.sum(whole.to(tl.float32), axis=0)
    summed += tl.load(residual + place, inside, 0.0).to(tl.float32)
    if GIVES_SUM:
        summed = summed.to(summed_out.dtype.element_ty)
        tl.store(summed_out + place, summed, inside)
        summed = summed.to(tl.float32)
    if AHEAD:
        gdc_launch_dependents()
    average = tl.sum(summed, axis=0) / width
    centred = tl.where(inside, summed - average, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    normed = centred * factor * own_weight + own_bias
    tl.store(normed_out + place, normed.to(normed_out.dtype.element_ty), inside)
