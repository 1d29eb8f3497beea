"""Fused kernel that adds the tokens' gated attention over the prefix to their attention over tokens.

A prefix (keys and values of the state) is short, so it stays in the registers of a streaming multiprocessor.
"""

# Shape suffixes: E encoder layers (of a diagonal), R = layers * documents, S = slots and tokens of a segment, P prefix
# length (= slots), L tokens in a segment, H heads, K head width, D model width.

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

# tokens per tile; least size of a matrix product's sides
TOKENS, LEAST = 64, 16


def add_prefix_read(
    slots_RPHK: Tensor,
    tokens_RLHK: Tensor,
    query_RHLK: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate_EH: Tensor,
    scaling: float,
) -> Tensor:
    """Add gated prefix attention to the tokens' attention output; return the output of slots and tokens, `(R, S, D)`.

    Prefix keys and values are `(R, H, P, K)`, `scaling` multiplies the products of queries and keys, and the gate is
    `tanh(gate_EH)`.
    """
    return _AddPrefixRead.apply(slots_RPHK, tokens_RLHK, query_RHLK, prefix_key, prefix_value, gate_EH, scaling)


class _AddPrefixRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slots: Tensor, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scaling: float
    ) -> Tensor:
        n_rows, n_heads, n_tokens, head_dim = query.shape
        n_slots, gate = slots.shape[1], gate.contiguous()
        out = tokens.new_empty(n_rows, n_slots + n_tokens, n_heads, head_dim)
        _forward[(n_rows * n_heads, triton.cdiv(n_tokens, TOKENS))](
            slots.contiguous(), tokens.contiguous(), query, *query.stride()[:3],
            key, *key.stride()[:3], value, *value.stride()[:3], gate, out,
            n_rows // len(gate), n_heads, n_tokens, n_slots, head_dim, scaling, **_sizes(key),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, gate)
        ctx.scaling = scaling
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, gate = ctx.saved_tensors
        n_rows, n_heads, n_tokens, head_dim = query.shape
        n_slots = key.shape[2]
        grad_tokens, grad_query = query.new_empty(2, n_rows, n_tokens, n_heads, head_dim)
        grad_slots, grad_key, grad_value = query.new_empty(3, n_rows, n_slots, n_heads, head_dim)
        grad_gate = gate.new_empty(len(gate), n_rows // len(gate), n_heads)
        _backward[(n_rows * n_heads,)](
            gradient.contiguous(), query, *query.stride()[:3], key, *key.stride()[:3], value, *value.stride()[:3],
            gate, grad_slots, grad_tokens, grad_query, grad_key, grad_value, grad_gate,
            n_rows // len(gate), n_heads, n_tokens, n_slots, head_dim, ctx.scaling, **_sizes(key),
        )  # fmt: skip
        grad_query, grad_key, grad_value = (part.transpose(1, 2) for part in (grad_query, grad_key, grad_value))
        grad_gate = grad_gate.sum(dim=1) if grad_gate.shape[1] > 1 else grad_gate[:, 0]
        return grad_slots, grad_tokens, grad_query, grad_key, grad_value, grad_gate, None


def _sizes(key: Tensor) -> dict[str, Any]:
    """Return the tile sizes; float32 products use full precision instead of TF32."""
    n_prefix, head_dim = (max(LEAST, triton.next_power_of_2(size)) for size in key.shape[2:])
    return {
        "TOKENS": TOKENS, "PREFIX": n_prefix, "WIDTH": head_dim,
        "PRECISION": "ieee" if key.dtype == torch.float32 else "tf32",
    }  # fmt: skip


@triton.jit
def _forward(
    slots, tokens, query, query_row, query_head, query_token, key, key_row, key_head, key_position,
    value, value_row, value_head, value_position, gate, out,
    n_documents, n_heads, n_tokens, n_slots, head_dim, scaling,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    within, position = tl.arange(0, WIDTH)[None, :], tl.arange(0, PREFIX)
    inside = (token < n_tokens) & (within < head_dim)
    known = (position[:, None] < n_slots) & (within < head_dim)
    keys = tl.load(key + row * key_row + head * key_head + position[:, None] * key_position + within, known, 0.0)
    values = tl.load(
        value + row * value_row + head * value_head + position[:, None] * value_position + within, known, 0.0
    )
    asked = tl.load(query + row * query_row + head * query_head + token * query_token + within, inside, 0.0)
    opening = 2.0 * tl.sigmoid(2.0 * tl.load(gate + row // n_documents * n_heads + head).to(tl.float32)) - 1.0
    scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scaling
    scores = tl.where(position[None, :] < n_slots, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    read = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    source = ((row * n_tokens + token) * n_heads + head) * head_dim + within
    target = ((row * (n_tokens + n_slots) + n_slots + token) * n_heads + head) * head_dim + within
    read = tl.load(tokens + source, inside, 0.0).to(tl.float32) + opening * read
    tl.store(out + target, read.to(out.dtype.element_ty), inside)
    if tl.program_id(1) == 0:
        own = ((row * n_slots + position[:, None]) * n_heads + head) * head_dim + within
        front = ((row * (n_tokens + n_slots) + position[:, None]) * n_heads + head) * head_dim + within
        tl.store(out + front, tl.load(slots + own, known, 0.0), known)


@triton.jit
def _backward(
    gradient, query, query_row, query_head, query_token, key, key_row, key_head, key_position,
    value, value_row, value_head, value_position, gate,
    grad_slots, grad_tokens, grad_query, grad_key, grad_value, grad_gate,
    n_documents, n_heads, n_tokens, n_slots, head_dim, scaling,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    within, position = tl.arange(0, WIDTH)[None, :], tl.arange(0, PREFIX)
    known = (position[:, None] < n_slots) & (within < head_dim)
    keys = tl.load(key + row * key_row + head * key_head + position[:, None] * key_position + within, known, 0.0)
    values = tl.load(
        value + row * value_row + head * value_head + position[:, None] * value_position + within, known, 0.0
    )
    opening = 2.0 * tl.sigmoid(2.0 * tl.load(gate + row // n_documents * n_heads + head).to(tl.float32)) - 1.0
    key_sum = tl.zeros([PREFIX, WIDTH], dtype=tl.float32)
    value_sum = tl.zeros([PREFIX, WIDTH], dtype=tl.float32)
    gate_sum = tl.zeros([TOKENS], dtype=tl.float32)
    for first in range(0, n_tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        inside = (token < n_tokens) & (within < head_dim)
        asked = tl.load(query + row * query_row + head * query_head + token * query_token + within, inside, 0.0)
        source = ((row * (n_tokens + n_slots) + n_slots + token) * n_heads + head) * head_dim + within
        arriving = tl.load(gradient + source, inside, 0.0)
        scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scaling
        scores = tl.where(position[None, :] < n_slots, scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
        grad_weights = tl.dot(arriving, tl.trans(values), input_precision=PRECISION)
        along = tl.sum(grad_weights * weights, axis=1)
        # gradient of the gate: prefix attention output times the output gradient
        gate_sum += along
        value_sum += tl.dot(tl.trans(weights.to(values.dtype)), arriving, input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - along[:, None]) * (opening * scaling)).to(values.dtype)
        leaving = tl.dot(grad_scores, keys, input_precision=PRECISION)
        target = ((row * n_tokens + token) * n_heads + head) * head_dim + within
        tl.store(grad_query + target, leaving.to(grad_query.dtype.element_ty), inside)
        tl.store(grad_tokens + target, arriving, inside)
        key_sum += tl.dot(tl.trans(grad_scores), asked, input_precision=PRECISION)
    own = ((row * n_slots + position[:, None]) * n_heads + head) * head_dim + within
    front = ((row * (n_tokens + n_slots) + position[:, None]) * n_heads + head) * head_dim + within
    tl.store(grad_slots + own, tl.load(gradient + front, known, 0.0), known)
    tl.store(grad_key + own, key_sum.to(grad_key.dtype.element_ty), known)
    tl.store(grad_value + own, (value_sum * opening).to(grad_value.dtype.element_ty), known)
    slope = (1.0 - opening * opening) * tl.sum(gate_sum, axis=0)
    tl.store(grad_gate + row * n_heads + head, slope.to(grad_gate.dtype.element_ty))
