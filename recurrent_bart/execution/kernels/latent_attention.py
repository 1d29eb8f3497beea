"""Fused attention of one new position per text to the encoder outputs of its document, without keys and values.

The score of a query q and an encoder output h is `q.(W_k h) = (W_k^T q).h`, so queries are multiplied by the keys'
weights instead of all encoder outputs. The keys' bias adds the same number to all scores of a query, and the softmax
does not change. Values work the other way round: the weighted sum of encoder outputs is multiplied by the values'
weights. All heads then read the same encoder outputs, which are half the bytes of keys and values. DeepSeek-V2
(https://arxiv.org/abs/2405.04434) calls this absorption.

Shape suffixes: B documents, R texts of all documents, H heads, A attended length, N parts of the attended length,
D model width.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from recurrent_bart.execution.kernels.programs import early_start, gdc_launch_dependents, gdc_wait
from recurrent_bart.execution.kernels.step_attention import tile_size

# KiB of shared memory of a program: the least from compute capability 8.0 on, and an H100's, also for the interpreter
LEAST_SHARED_KIB, LARGE_SHARED_KIB = 99, 227
# encoder outputs that a program could read while it starts and ends
START_KEYS = 96
# columns and parts of a program's tile that merges parts
MERGED_COLUMNS, MERGED_PARTS = 256, 16
# rows, output columns and input columns of a program's tile in the products of each head, and its warps
MOST_ROWS = 64
QUERY_COLUMNS, QUERY_WARPS = 128, 4
VALUE_COLUMNS, VALUE_INNER, VALUE_WARPS = 16, 256, 2


class LatentTile(NamedTuple):
    """Tile of a program that attends to encoder outputs.

    Each warp multiplies its columns of the encoder outputs, so `n_chunks` is the number of warps. Triton loads the next
    tiles during a product only if a tile has more than `256 * n_chunks / chunk` encoder outputs.

    Attributes:
        rows: Queries, heads and texts of one document together.
        keys: Encoder outputs.
        n_chunks: Parts of the model width.
        chunk: Columns of a part.
        n_stages: Pipeline stages.
        per_processor: Programs that a streaming multiprocessor holds.
    """

    rows: int
    keys: int
    n_chunks: int
    chunk: int
    n_stages: int
    per_processor: int


def latent_tile(n_rows: int, width: int, shared_kib: int) -> LatentTile:
    """Return the tile for a document with `n_rows` queries; GPUs with less shared memory get smaller tiles."""
    is_large, width = shared_kib >= LARGE_SHARED_KIB, tile_size(width)
    rows = 32 if is_large and n_rows > 16 else 16
    if width <= 512:
        return LatentTile(rows, 32, 4, max(16, width // 4), 3, 2 if is_large else 1)
    if is_large:
        return LatentTile(rows, 32, 8, width // 8, 3, 1)
    return LatentTile(rows, 16, 4, width // 4, 3 if shared_kib > 128 else 2, 1)


def attend_to_latents(
    query_RD: Tensor,
    context_BAD: Tensor,
    key_weight_DD: Tensor,
    value_weight_DD: Tensor,
    value_bias_D: Tensor,
    n_heads: int,
    scale: float,
    mask_BA: Tensor | None = None,
    end_B: Tensor | None = None,
) -> Tensor:
    """Return the attention output `(R, D)` of all texts; the texts of a document follow each other.

    Args:
        query_RD: Queries.
        context_BAD: Encoder outputs, contiguous.
        key_weight_DD: Weight of the linear map that would compute keys.
        value_weight_DD: Weight of the linear map that would compute values.
        value_bias_D: Bias of the linear map that would compute values.
        n_heads: Heads, H.
        scale: Factor of the scores.
        mask_BA: Number that is added to the scores; None: all positions are visible.
        end_B: Number of positions up to the last visible one, in int32; given with a mask.
    """
    query_RHD = multiply_by_keys(query_RD, key_weight_DD, n_heads, scale)
    read_RHD = read_latents(query_RHD, context_BAD, mask_BA, end_B)
    return multiply_by_values(read_RHD, value_weight_DD, value_bias_D, end_B)


def multiply_by_keys(query_RD: Tensor, weight_DD: Tensor, n_heads: int, scale: float) -> Tensor:
    """Return each head's query times its keys' weights and the scale, `(R, H, D)`."""
    n_rows, width = query_RD.shape
    head_width = width // n_heads
    out = query_RD.new_empty(n_rows, n_heads, weight_DD.shape[1])
    rows = _row_tile(n_rows)
    _multiply_heads[(triton.cdiv(out.shape[2], QUERY_COLUMNS), n_heads, triton.cdiv(n_rows, rows))](
        query_RD, weight_DD, out, out, out, n_rows, head_width, out.shape[2], *_strides(query_RD, n_heads),
        head_width * weight_DD.stride(0), weight_DD.stride(0), weight_DD.stride(1), *out.stride()[:2], 1, scale,
        ROWS=rows, COLUMNS=QUERY_COLUMNS, INNER=tile_size(head_width), HAS_BIAS=False, HAS_END=False,
        num_warps=QUERY_WARPS, **early_start(out.device),
    )  # fmt: skip
    return out


def multiply_by_values(read_RHD: Tensor, weight_DD: Tensor, bias_D: Tensor, end_B: Tensor | None) -> Tensor:
    """Return each head's sum of encoder outputs times its values' weights, plus the bias, `(R, D)`.

    Texts of documents without visible positions get zeros.
    """
    n_rows, n_heads, width = read_RHD.shape
    head_width = len(weight_DD) // n_heads
    out = read_RHD.new_empty(n_rows, len(weight_DD))
    rows = _row_tile(n_rows)
    _multiply_heads[(triton.cdiv(head_width, VALUE_COLUMNS), n_heads, triton.cdiv(n_rows, rows))](
        read_RHD, weight_DD, bias_D, out if end_B is None else end_B, out, n_rows, width, head_width,
        *read_RHD.stride()[:2], head_width * weight_DD.stride(0), weight_DD.stride(1), weight_DD.stride(0),
        *_strides(out, n_heads), 1 if end_B is None else n_rows // len(end_B), 1.0,
        ROWS=rows, COLUMNS=VALUE_COLUMNS, INNER=VALUE_INNER, HAS_BIAS=True, HAS_END=end_B is not None,
        num_warps=VALUE_WARPS, num_stages=4, **early_start(out.device),
    )  # fmt: skip
    return out


def read_latents(
    query_RHD: Tensor,
    context_BAD: Tensor,
    mask_BA: Tensor | None,
    end_B: Tensor | None,
    tile: LatentTile | None = None,
    n_parts: int | None = None,
) -> Tensor:
    """Return the sums `(R, H, D)` of encoder outputs, weighted by the softmax of their products with the queries.

    Args:
        query_RHD: Queries of all heads, contiguous.
        context_BAD: Encoder outputs, contiguous.
        mask_BA: Number that is added to the scores; None: all positions are visible.
        end_B: Number of positions up to the last visible one, in int32; given with a mask.
        tile: Tile of a program; None: `latent_tile`.
        n_parts: Parts of the attended length; None: `count_latent_parts`.
    """
    n_documents, n_keys, width = context_BAD.shape
    # queries of a document: texts times heads
    n_rows = query_RHD.shape[0] * query_RHD.shape[1] // n_documents
    device = query_RHD.device
    tile = latent_tile(n_rows, width, shared_kib(device)) if tile is None else tile
    n_blocks = triton.cdiv(n_rows, tile.rows)
    if n_parts is None:
        n_parts = count_latent_parts(n_documents * n_blocks, n_keys, tile.per_processor * count_processors(device))
    part_keys = triton.cdiv(triton.cdiv(n_keys, n_parts), tile.keys) * tile.keys
    # sums of the parts, their largest scores and the sums of their exponentials
    partial = query_RHD.new_empty(n_documents, n_parts, n_rows, width, dtype=torch.float32)
    largest, total = query_RHD.new_empty(2, n_documents, n_parts, n_rows, dtype=torch.float32)
    has_mask = mask_BA is not None
    _read_latents[(n_blocks, n_parts, n_documents)](
        query_RHD, context_BAD, mask_BA if has_mask else partial, end_B if has_mask else partial,
        partial, largest, total, n_rows, n_keys, n_parts, part_keys, mask_BA.stride(0) if has_mask else 0,
        WIDTH=width, ROWS=tile.rows, KEYS=tile.keys, CHUNKS=tile.n_chunks, CHUNK=tile.chunk, STAGES=tile.n_stages,
        HAS_MASK=has_mask, num_warps=tile.n_chunks, **early_start(device),
    )  # fmt: skip
    out = torch.empty_like(query_RHD)
    _merge_latents[(n_documents * n_rows, triton.cdiv(width, MERGED_COLUMNS))](
        partial, largest, total, out, n_rows, n_parts, width,
        COLUMNS=MERGED_COLUMNS, PARTS=MERGED_PARTS, ALL_PARTS=triton.next_power_of_2(n_parts), **early_start(device),
    )  # fmt: skip
    return out


@functools.lru_cache
def count_latent_parts(n_blocks: int, n_keys: int, n_places: int) -> int:
    """Return the number of parts of the attended length that takes the least time.

    Args:
        n_blocks: Programs without parts.
        n_keys: Attended length.
        n_places: Programs that the GPU runs at once.
    """

    def seconds(n_parts: int) -> int:
        return triton.cdiv(n_blocks * n_parts, n_places) * (triton.cdiv(n_keys, n_parts) + START_KEYS)

    return min(range(1, max(2, min(n_places, n_keys // START_KEYS) + 1)), key=seconds)


def count_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; a CPU counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_kib(device: torch.device) -> int:
    """Return the KiB of shared memory that a program may use."""
    if device.type != "cuda":
        return LARGE_SHARED_KIB
    # Any: PyTorch's stub lacks the attribute. AMD's GPUs do too
    properties: Any = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) // 1024


def _row_tile(n_rows: int) -> int:
    return min(MOST_ROWS, tile_size(n_rows))


def _strides(rows_RD: Tensor, n_heads: int) -> tuple[int, int]:
    """Return the strides of rows and heads."""
    return rows_RD.stride(0), rows_RD.shape[1] // n_heads


@triton.jit
def _multiply_heads(
    rows, weight, bias, end, out, n_rows, width, n_out, row_stride, head_stride, weight_head_stride, inner_stride,
    column_stride, out_row_stride, out_head_stride, n_texts, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_END: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, INNER)
    weights = weight + head * weight_head_stride + column[None, :] * column_stride
    own_rows = rows + row.to(tl.int64)[:, None] * row_stride + head * head_stride
    is_row, is_column = (row < n_rows)[:, None], (column < n_out)[None, :]
    # the weights do not depend on the previous kernel
    read = tl.load(weights + inner[:, None] * inner_stride, (inner < width)[:, None] & is_column, 0.0)
    if AHEAD:
        gdc_wait()
    own = tl.load(own_rows + inner[None, :], is_row & (inner < width)[None, :], 0.0)
    sums = tl.dot(own, read, input_precision="ieee")
    for first in tl.range(INNER, width, INNER):
        inner = first + tl.arange(0, INNER)
        own = tl.load(own_rows + inner[None, :], is_row & (inner < width)[None, :], 0.0)
        read = tl.load(weights + inner[:, None] * inner_stride, (inner < width)[:, None] & is_column, 0.0)
        sums = tl.dot(own, read, sums, input_precision="ieee")
    if AHEAD:
        gdc_launch_dependents()
    sums *= scale
    if HAS_BIAS:
        sums += tl.load(bias + head * n_out + column, column < n_out, 0.0).to(tl.float32)[None, :]
    if HAS_END:
        is_seen = tl.load(end + row // n_texts, row < n_rows, 0) > 0
        sums = tl.where(is_seen[:, None], sums, 0.0)
    there = out + row.to(tl.int64)[:, None] * out_row_stride + head * out_head_stride + column[None, :]
    tl.store(there, sums.to(out.dtype.element_ty), is_row & is_column)


@triton.jit
def _read_latents(
    query, context, mask, end, partial, largest_out, total_out, n_rows, n_keys, n_parts, part_keys, mask_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, HAS_MASK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_wait()
    part, document = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # the width is divided among the warps, which together compute the scores
    column = tl.arange(0, CHUNKS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    is_column = column < WIDTH
    first_key = part * part_keys
    end_key = tl.minimum(n_keys, first_key + part_keys)
    if HAS_MASK:
        end_key = tl.minimum(end_key, tl.load(end + document))
    is_row = row < n_rows
    is_here = is_row[None, :, None] & is_column
    asked = tl.load(query + (document * n_rows + row)[None, :, None] * WIDTH + column, is_here, 0.0)
    read = tl.zeros([CHUNKS, ROWS, CHUNK], tl.float32)
    largest, total = tl.full([ROWS], -1.0e30, tl.float32), tl.zeros([ROWS], tl.float32)
    own_context = context + document * n_keys * WIDTH
    for first in tl.range(first_key, end_key, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        inside = key < end_key
        is_kept = inside[None, :, None] & is_column
        kept = tl.load(own_context + key[None, :, None] * WIDTH + column, is_kept, 0.0)
        score = tl.sum(tl.dot(asked, tl.trans(kept, (0, 2, 1)), input_precision="ieee"), axis=0)
        if HAS_MASK:
            score += tl.load(mask + document * mask_stride + key, inside, 0.0).to(tl.float32)[None, :]
        score = tl.where(inside[None, :], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        weight, faded = tl.exp(score - larger[:, None]), tl.exp(largest - larger)
        every = tl.broadcast_to(weight.to(kept.dtype)[None, :, :], [CHUNKS, ROWS, KEYS])
        read = tl.dot(every, kept, read * faded[None, :, None], input_precision="ieee")
        total = total * faded + tl.sum(weight, axis=1)
        largest = larger
    if AHEAD:
        gdc_launch_dependents()
    place = (document * n_parts + part) * n_rows + row
    tl.store(partial + place[None, :, None] * WIDTH + column, read, is_here)
    tl.store(largest_out + place, largest, is_row)
    tl.store(total_out + place, total, is_row)


@triton.jit
def _merge_latents(
    partial, largest, total, out, n_rows, n_parts, width, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_place = row // n_rows * n_parts * n_rows + row % n_rows
    part = tl.arange(0, ALL_PARTS)
    own_largest = tl.load(largest + first_place + part * n_rows, part < n_parts, -1.0e30)
    most = tl.max(own_largest, axis=0)
    totals = tl.load(total + first_place + part * n_rows, part < n_parts, 0.0)
    whole = tl.sum(totals * tl.exp(own_largest - most), axis=0)
    read = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, n_parts, PARTS):
        # Triton 3.6 refuses a variable of one length before the loop and of another length inside
        some = first + tl.arange(0, PARTS)
        place = first_place + some * n_rows
        factor = tl.exp(tl.load(largest + place, some < n_parts, -1.0e30) - most)
        inside = (some < n_parts)[:, None] & (column < width)[None, :]
        read += tl.sum(tl.load(partial + place[:, None] * width + column[None, :], inside, 0.0) * factor[:, None], 0)
    found = tl.where(whole > 0.0, read / whole, 0.0)
    tl.store(out + row * width + column, found.to(out.dtype.element_ty), column < width)
