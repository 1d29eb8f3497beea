"""Fused kernels at both ends of a decoding step: embedding of the last tokens, and choice of the best tokens.

Shape suffixes: R texts, T target length, V vocabulary, D model width.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from recurrent_bart.execution.kernels.programs import early_start, gdc_launch_dependents, gdc_wait

# scores of a program's tile
SCORES = 4096
# most texts of one program, which ends the choice
MOST_TEXTS = 512


def embed_tokens(
    token_R: Tensor,
    position: Tensor,
    token_VD: Tensor,
    position_TD: Tensor,
    scale: float,
    weight_D: Tensor,
    bias_D: Tensor,
    epsilon: float,
) -> Tensor:
    """Return the norm of token embedding times `scale` plus position embedding, `(R, D)`.

    Args:
        token_R: Tokens.
        position: `(1,)`, index of the tokens in their texts.
        token_VD: Embeddings of tokens.
        position_TD: Embeddings of positions, from position 0 on.
        scale: Factor of token embeddings.
        weight_D: Weight of the norm.
        bias_D: Bias of the norm.
        epsilon: Number that is added to the variance.
    """
    n_texts, width = len(token_R), token_VD.shape[1]
    out = token_VD.new_empty(n_texts, width)
    _embed_tokens[(n_texts,)](
        token_R, position, token_VD, position_TD, weight_D, bias_D, out, width, scale, epsilon,
        BLOCK=triton.next_power_of_2(width), **early_start(out.device),
    )  # fmt: skip
    return out


def append_best(
    scores_RV: Tensor, ids_RT: Tensor, position: Tensor, is_unfinished_R: Tensor, n_steps: Tensor, eos: Tensor, pad: int
) -> None:
    """Append the best token to each text, in place, and advance `position`; finished texts get the pad token.

    Args:
        scores_RV: Scores in float32; of equal ones the first is the best.
        ids_RT: Texts so far; position `position + 1` is written.
        position: `(1,)`, index of the last token.
        is_unfinished_R: True for texts without an end token.
        n_steps: `(1,)`, number of steps with an unfinished text.
        eos: End tokens.
        pad: Token of finished texts.
    """
    # a user's processor may return a view
    scores_RV = scores_RV.contiguous()
    n_texts, n_tokens = scores_RV.shape
    n_parts = triton.cdiv(n_tokens, SCORES)
    best = scores_RV.new_empty(n_texts, n_parts)
    token = scores_RV.new_empty(n_texts, n_parts, dtype=torch.int32)
    early = early_start(scores_RV.device)
    _find_best[(n_texts, n_parts)](scores_RV, best, token, n_tokens, n_parts, SCORES=SCORES, **early)
    _append_best[(1,)](
        best, token, ids_RT, position, is_unfinished_R.view(torch.uint8), n_steps, eos, n_texts, ids_RT.shape[1],
        n_parts, len(eos), pad,
        TEXTS=triton.next_power_of_2(n_texts), PARTS=triton.next_power_of_2(n_parts), **early,
    )  # fmt: skip


@triton.jit
def _embed_tokens(
    chosen, position, tokens, positions, weight, bias, out, width, scale, epsilon,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    text = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    here = tl.load(position)
    token = tl.load(chosen + text)
    # rounded as PyTorch's product and sum are
    embedded = (tl.load(tokens + token * width + column, inside, 0.0).to(tl.float32) * scale).to(out.dtype.element_ty)
    place = tl.load(positions + here * width + column, inside, 0.0).to(tl.float32)
    summed = (embedded.to(tl.float32) + place).to(out.dtype.element_ty).to(tl.float32)
    centred = tl.where(inside, summed - tl.sum(summed, axis=0) / width, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    normed = centred * factor * tl.load(weight + column, inside, 0.0).to(tl.float32)
    normed += tl.load(bias + column, inside, 0.0).to(tl.float32)
    tl.store(out + text * width + column, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _find_best(scores, best, token, n_tokens, n_parts, SCORES: tl.constexpr, AHEAD: tl.constexpr):
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    text, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * SCORES + tl.arange(0, SCORES)
    score = tl.load(scores + text * n_tokens + column, column < n_tokens, float("-inf"))
    # a score that is not a number is the best, as in PyTorch's argmax
    score = tl.where(score == score, score, float("inf"))
    largest = tl.max(score, axis=0)
    first = tl.min(tl.where((score == largest) & (column < n_tokens), column, n_tokens - 1), axis=0)
    tl.store(best + text * n_parts + part, largest)
    tl.store(token + text * n_parts + part, first)


@triton.jit
def _append_best(
    best, token, ids, position, is_unfinished, n_steps, eos, n_texts, ids_row, n_parts, n_eos, pad,
    TEXTS: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if AHEAD:
        gdc_launch_dependents()
        gdc_wait()
    text, part = tl.arange(0, TEXTS), tl.arange(0, PARTS)
    is_text = text < n_texts
    inside = is_text[:, None] & (part < n_parts)[None, :]
    place = text[:, None] * n_parts + part[None, :]
    score = tl.load(best + place, inside, float("-inf"))
    is_best = (score == tl.max(score, axis=1)[:, None]) & inside
    # parts are in the order of their tokens
    chosen = tl.min(tl.where(is_best, tl.load(token + place, inside, 0), 2147483647), axis=1).to(tl.int64)
    goes_on = tl.load(is_unfinished + text, is_text, 0) != 0
    tl.store(n_steps, tl.load(n_steps) + tl.max(goes_on.to(tl.int64), axis=0))
    chosen = tl.where(goes_on, chosen, pad)
    for number in range(n_eos):
        goes_on = goes_on & (chosen != tl.load(eos + number))
    there = tl.load(position) + 1
    tl.store(ids + text.to(tl.int64) * ids_row + there, chosen, is_text)
    tl.store(is_unfinished + text, goes_on.to(tl.uint8), is_text)
    # every thread reads the position before any writes it
    tl.debug_barrier()
    tl.store(position, there)
