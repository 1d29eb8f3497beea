"""Fused attention of one new position per text: to the cached positions of the text, and to a document's context.

Shape suffixes: B documents, S texts of a document, G texts that share a cache, C caches, R texts of all documents,
H heads, K head width, T target length, A attended length, N parts of the attended length, D model width.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from recurrent_bart.execution.kernels.programs import early_start, gdc_launch_dependents, gdc_wait

# keys of a program's tile for the cache of one text, and of several texts
OWN_KEYS, SHARED_KEYS = 64, 32
# bytes of a program's tile of context keys. A program holds four of these tiles, and GPUs have from 99 KiB
MOST_TILE_BYTES = 16_384
# programs that fill a GPU
MANY_PROGRAMS = 132
# programs per streaming multiprocessor, and fewest keys of a part; fewer keys cost less than the sum of two parts
PROGRAMS_PER_PROCESSOR, LEAST_PART = 4, 512
# rows and columns of the smallest tile of a matrix product
LEAST_TILE = 16


def attend_to_text(
    query_key_value: Tensor, cache: Tensor, position: Tensor, ancestor: Tensor | None, scale: float
) -> Tensor:
    """Write the new keys and values into the cache, and return the attention output `(R, D)`.

    Args:
        query_key_value: `(R, 3 * D)`, query, key and value of each text's new position.
        cache: Keys and values `(2, C, H, T, G, K)`; position `position` is written.
        position: `(1,)`, index of the new position.
        ancestor: `(C, G, T)`, the text whose keys and values belong to each text and position; None with G = 1.
        scale: Factor of the scores.
    """
    _, n_caches, n_heads, n_positions, n_sharing, head_width = cache.shape
    out = query_key_value.new_empty(n_caches * n_sharing, n_heads * head_width)
    n_keys = OWN_KEYS if n_sharing == 1 else SHARED_KEYS
    n_warps = 4 if n_sharing > 1 else 2 if n_caches * n_heads < 4 * MANY_PROGRAMS else 1
    _attend_to_text[(n_caches, n_heads)](
        query_key_value, cache[0], cache[1], position, cache if ancestor is None else ancestor, out,
        n_heads, n_positions, 0 if ancestor is None else ancestor.shape[2], scale,
        SHARING=n_sharing, ROWS=tile_size(n_sharing), HEAD=head_width, WIDTH=tile_size(head_width), KEYS=n_keys,
        num_warps=n_warps, **early_start(out.device),
    )  # fmt: skip
    return out


def attend_to_context(
    query_RD: Tensor, key_BHAK: Tensor, value_BHAK: Tensor, mask_BA: Tensor | None, end_B: Tensor | None, scale: float
) -> Tensor:
    """Return the attention output `(R, D)` of all texts; the texts of a document follow each other.

    Args:
        query_RD: Queries.
        key_BHAK: Keys; the last dimension is contiguous.
        value_BHAK: Values, with the strides of the keys.
        mask_BA: Number that is added to the scores; None: all positions are visible.
        end_B: Number of positions up to the last visible one, in int32; given with a mask.
        scale: Factor of the scores.
    """
    n_documents, n_heads, n_keys, head_width = key_BHAK.shape
    n_texts = len(query_RD) // n_documents
    n_parts = count_parts(n_documents * n_heads, n_keys, query_RD.device)
    tile_keys, n_warps = context_tile(n_documents * n_heads * n_parts, tile_size(head_width) * query_RD.element_size())
    part_keys = triton.cdiv(triton.cdiv(n_keys, n_parts), tile_keys) * tile_keys
    out = torch.empty_like(query_RD)
    sizes = n_documents * n_heads, n_parts, n_texts
    # outputs of the parts, their largest scores and the sums of their exponentials
    partial = query_RD.new_empty(*sizes, head_width, dtype=torch.float32) if n_parts > 1 else out
    largest, total = query_RD.new_empty(2, *sizes, dtype=torch.float32) if n_parts > 1 else (out, out)
    has_mask = mask_BA is not None
    _attend_to_context[(n_documents * n_heads, n_parts)](
        query_RD, key_BHAK, value_BHAK, mask_BA if has_mask else out, end_B if has_mask else out,
        out, partial, largest, total, n_heads, n_keys, n_parts, part_keys, *key_BHAK.stride()[:3],
        mask_BA.stride(0) if has_mask else 0, scale,
        TEXTS=n_texts, ROWS=tile_size(n_texts), HEAD=head_width, WIDTH=tile_size(head_width), KEYS=tile_keys,
        HAS_PARTS=n_parts > 1, HAS_MASK=has_mask, num_warps=n_warps, **early_start(out.device),
    )  # fmt: skip
    if n_parts > 1:
        _merge_parts[(n_documents * n_heads, n_texts)](
            partial, largest, total, out, n_heads, n_parts,
            TEXTS=n_texts, HEAD=head_width, WIDTH=tile_size(head_width), PARTS=triton.next_power_of_2(n_parts),
            **early_start(out.device),
        )  # fmt: skip
    return out


def tile_size(length: int) -> int:
    """Return the size of a tile's dimension: a power of two, and no less than a matrix product needs."""
    return max(LEAST_TILE, triton.next_power_of_2(length))


def context_tile(n_programs: int, row_bytes: int) -> tuple[int, int]:
    """Return keys of a tile and warps of a program: larger tiles if programs are few, as far as memory allows."""
    n_keys, n_warps = (128, 4) if n_programs < MANY_PROGRAMS else (64, 2)
    return max(LEAST_TILE, min(n_keys, MOST_TILE_BYTES // row_bytes)), n_warps


def count_parts(n_rows: int, n_keys: int, device: torch.device) -> int:
    """Return the number of parts of the attended length, so that all programs together fill the GPU."""
    if device.type != "cuda":
        return max(1, n_keys // LEAST_PART)
    n_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(PROGRAMS_PER_PROCESSOR * n_processors // n_rows, n_keys // LEAST_PART))


@triton.jit
def _fold(score, value, read, largest, total):
    """Add the keys of a tile to the weighted sum of values, their largest score and the sum of their exponentials."""
    larger = tl.maximum(largest, tl.max(score, axis=1))
    weight, faded = tl.exp(score - larger[:, None]), tl.exp(largest - larger)
    read = read * faded[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    return read, larger, total * faded + tl.sum(weight, axis=1)


@triton.jit
def _attend_to_text(
    query_key_value, key_cache, value_cache, position, ancestor, out, n_heads, n_positions, ancestor_row, scale,
    SHARING: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_wait()
    own, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(position).to(tl.int32)
    d_model = n_heads * HEAD
    column = tl.arange(0, WIDTH)
    is_column = column < HEAD
    offset = (own.to(tl.int64) * n_heads + head) * n_positions * SHARING * HEAD
    keys, values = key_cache + offset, value_cache + offset
    if SHARING == 1:
        place = query_key_value + own.to(tl.int64) * 3 * d_model + head * HEAD + column
        new_key = tl.load(place + d_model, is_column, 0.0)
        new_value = tl.load(place + 2 * d_model, is_column, 0.0)
        tl.store(keys + here * HEAD + column, new_key, is_column)
        tl.store(values + here * HEAD + column, new_value, is_column)
        query = tl.load(place, is_column, 0.0).to(tl.float32) * scale
        largest = tl.sum(query * new_key.to(tl.float32), axis=0)
        total = tl.full([], 1.0, tl.float32)
        read = new_value.to(tl.float32)
        for first in range(0, here, KEYS):
            key = first + tl.arange(0, KEYS)
            inside = (key < here)[:, None] & is_column[None, :]
            there = key[:, None] * HEAD + column[None, :]
            score = tl.sum(tl.load(keys + there, inside, 0.0).to(tl.float32) * query[None, :], axis=1)
            score = tl.where(key < here, score, float("-inf"))
            value = tl.load(values + there, inside, 0.0).to(tl.float32)
            larger = tl.maximum(largest, tl.max(score, axis=0))
            weight, faded = tl.exp(score - larger), tl.exp(largest - larger)
            total = total * faded + tl.sum(weight, axis=0)
            read = read * faded + tl.sum(weight[:, None] * value, axis=0)
            largest = larger
        if AHEAD:
            gdc_launch_dependents()
        there = out + own.to(tl.int64) * d_model + head * HEAD + column
        tl.store(there, (read / total).to(out.dtype.element_ty), is_column)
    else:
        text = tl.arange(0, ROWS)
        is_text = text < SHARING
        is_here = is_text[:, None] & is_column[None, :]
        row = own.to(tl.int64) * SHARING + text
        place = query_key_value + row[:, None] * 3 * d_model + head * HEAD + column[None, :]
        query = tl.load(place, is_here, 0.0)
        new_key = tl.load(place + d_model, is_here, 0.0)
        new_value = tl.load(place + 2 * d_model, is_here, 0.0)
        new_place = (here * SHARING + text[:, None]) * HEAD + column[None, :]
        tl.store(keys + new_place, new_key, is_here)
        tl.store(values + new_place, new_value, is_here)
        largest = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
        total = tl.full([ROWS], 1.0, tl.float32)
        read = new_value.to(tl.float32)
        for first in range(0, here * SHARING, KEYS):
            key = first + tl.arange(0, KEYS)
            inside = key < here * SHARING
            is_kept = inside[:, None] & is_column[None, :]
            there = key[:, None] * HEAD + column[None, :]
            score = tl.dot(query, tl.load(keys + there, is_kept, 0.0).T, input_precision="ieee") * scale
            seen = inside[None, :] & is_text[:, None]
            owner = tl.load(ancestor + row[:, None] * ancestor_row + (key // SHARING)[None, :], seen, -1)
            score = tl.where(owner == (key % SHARING)[None, :], score, float("-inf"))
            value = tl.load(values + there, is_kept, 0.0)
            read, largest, total = _fold(score, value, read, largest, total)
        if AHEAD:
            gdc_launch_dependents()
        there = out + row[:, None] * d_model + head * HEAD + column[None, :]
        tl.store(there, (read / total[:, None]).to(out.dtype.element_ty), is_here)


@triton.jit
def _attend_to_context(
    query, keys, values, mask, end, out, partial, largest_out, total_out, n_heads, n_keys, n_parts, part_keys,
    document_stride, head_stride, key_stride, mask_stride, scale,
    TEXTS: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    HAS_PARTS: tl.constexpr, HAS_MASK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_wait()
    both, part = tl.program_id(0), tl.program_id(1)
    document, head = (both // n_heads).to(tl.int64), both % n_heads
    column = tl.arange(0, WIDTH)
    is_column = column < HEAD
    offset = document * document_stride + head * head_stride
    first_key = part * part_keys
    end_key = tl.minimum(n_keys, first_key + part_keys)
    if HAS_MASK:
        end_key = tl.minimum(end_key, tl.load(end + document))
    text = tl.arange(0, ROWS)
    is_text = text < TEXTS
    is_here = is_text[:, None] & is_column[None, :]
    row = document * TEXTS + text
    there = row[:, None] * n_heads * HEAD + head * HEAD + column[None, :]
    asked = tl.load(query + there, is_here, 0.0)
    read = tl.zeros([ROWS, WIDTH], tl.float32)
    largest, total = tl.full([ROWS], -1.0e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for first in tl.range(first_key, end_key, KEYS, num_stages=3):
        key = first + tl.arange(0, KEYS)
        inside = key < end_key
        is_kept = inside[:, None] & is_column[None, :]
        kept = offset + key.to(tl.int64)[:, None] * key_stride + column[None, :]
        score = tl.dot(asked, tl.load(keys + kept, is_kept, 0.0).T, input_precision="ieee") * scale
        if HAS_MASK:
            score += tl.load(mask + document * mask_stride + key, inside, 0.0).to(tl.float32)[None, :]
        score = tl.where(inside[None, :], score, float("-inf"))
        value = tl.load(values + kept, is_kept, 0.0)
        read, largest, total = _fold(score, value, read, largest, total)
    if AHEAD:
        gdc_launch_dependents()
    if not HAS_PARTS:
        found = tl.where(total[:, None] > 0.0, read / total[:, None], 0.0)
        tl.store(out + there, found.to(out.dtype.element_ty), is_here)
    else:
        place = (both.to(tl.int64) * n_parts + part) * TEXTS + text
        tl.store(partial + place[:, None] * HEAD + column[None, :], read, is_here)
        tl.store(largest_out + place, largest, is_text)
        tl.store(total_out + place, total, is_text)


@triton.jit
def _merge_parts(
    partial, largest, total, out, n_heads, n_parts, TEXTS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    both, text = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    is_column = column < HEAD
    place = (both * n_parts + part) * TEXTS + text
    own_largest = tl.load(largest + place, part < n_parts, -1.0e30)
    factor = tl.exp(own_largest - tl.max(own_largest, axis=0))
    whole = tl.sum(tl.load(total + place, part < n_parts, 0.0) * factor, axis=0)
    inside = (part < n_parts)[:, None] & is_column[None, :]
    read = tl.load(partial + place[:, None] * HEAD + column[None, :], inside, 0.0)
    found = tl.where(whole > 0.0, tl.sum(read * factor[:, None], axis=0) / whole, 0.0)
    row = both // n_heads * TEXTS + text
    tl.store(out + row * n_heads * HEAD + both % n_heads * HEAD + column, found.to(out.dtype.element_ty), is_column)
