"""Scheduled sampling: decoder inputs that are partly the model's own predictions.

In training the model predicts every token from the target's tokens, in generation from its own (exposure bias). An
oracle replaces some input tokens by tokens that the model would have written. The labels stay the target's. Zhang et
al., ACL 2019, arXiv 1906.02448.

Shape suffixes: B documents, C candidates of a beam search, M = B * C, T target length, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.model.loss import IGNORED
from recurrent_bart.recurrence.segmentation import to_device

ORACLES = ("none", "word", "sentence")
# longest compared n-gram, as in BLEU
LONGEST_NGRAM = 4

# function from the last id and the parent beam of each beam to scores (M, V) of the next id
NextLogits = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Oracle:
    """Settings of scheduled sampling: the source of replacement tokens, and the share of tokens not replaced.

    Attributes:
        kind: `"word"`: the best next token of a decoder pass over the target; `"sentence"`: tokens of the text nearest
            to the target among a beam search's texts of the target's length.
        gold_probability: Share of input tokens that are not replaced; 1: all, and no extra decoder pass is run.
        temperature: Scale of the Gumbel noise on scores. 0: none. 1: `"word"` samples from the model's distribution.
        n_beams: Beams of the search.
        n_steps: At least the longest target's length on any rank, so that all ranks run equally many decoder passes.
    """

    kind: str
    gold_probability: float
    temperature: float = 1.0
    n_beams: int = 3
    n_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ORACLES[1:]:
            raise ValueError(f"oracle {self.kind!r}: allowed are {', '.join(ORACLES[1:])}")
        if not 0 <= self.gold_probability <= 1:
            raise ValueError(f"gold_probability={self.gold_probability}: must be from 0 to 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")
        if self.n_beams < 1:
            raise ValueError(f"n_beams={self.n_beams}: must be at least 1")


@dataclass(frozen=True)
class SpecialIds:
    """Special ids: end, padding, and `outside`, the ids that never occur inside a text."""

    eos: int
    pad: int
    outside: tuple[int, ...]


def gold_probability(epoch: float, decay: float) -> float:
    """Return the share of the target's tokens after `epoch` epochs: `mu / (mu + exp(epoch / mu))`, mu = `decay` > 0.

    The share begins at `mu / (mu + 1)` and is one half after `mu * log(mu)` epochs.
    """
    # same value; exp(-x) does not overflow
    weight = decay * math.exp(-epoch / decay)
    return weight / (weight + 1)


def noisy(logits: Tensor, temperature: float) -> Tensor:
    """Add Gumbel noise of scale `temperature` to scores, in float32 at least."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not temperature:
        return precise
    # The paper also divides the noisy scores by the temperature, which does not change their order. Gumbel noise is
    # minus the log of an exponential variable; the log of a uniform variable could be infinite.
    return precise - temperature * torch.empty_like(precise).exponential_().log()


def word_oracle(logits_BTV: Tensor, temperature: float, special: SpecialIds) -> Tensor:
    """Return the best next token `(B, T)` under noise; never an end or pad token, because no token follows these."""
    return _without(noisy(logits_BTV, temperature), special.outside).argmax(dim=-1)


def sentence_oracle(
    next_logits: NextLogits, inputs_BT: Tensor, labels_BT: Tensor, oracle: Oracle, special: SpecialIds
) -> Tensor:
    """Run a beam search for texts of the target's length; return the text nearest to the target, `(B, T)`."""
    target_length = labels_BT.shape[1]
    n_steps = max(oracle.n_steps, target_length)
    texts_BCT = forced_length_beams(
        next_logits, inputs_BT[:, 0], target_lengths(labels_BT), n_steps, oracle.n_beams, oracle.temperature, special
    )
    return nearest_text(texts_BCT[..., :target_length], labels_BT)


def forced_length_beams(
    next_logits: NextLogits,
    start_B: Tensor,
    lengths_B: Tensor,
    n_steps: int,
    n_beams: int,
    temperature: float,
    special: SpecialIds,
) -> Tensor:
    """Return texts `(B, C, n_steps)` of forced lengths, the likeliest first, padded after the end.

    `next_logits` is called `n_steps - 1` times for any lengths, because the end token is not searched. `lengths_B`
    include the end token; 0: no text. `n_steps` is at least the largest length.
    """
    own_BC = torch.arange(n_beams, device=start_B.device).expand(len(start_B), -1)
    offset_B1 = n_beams * torch.arange(len(start_B), device=start_B.device).unsqueeze(1)
    ids_BC, parents_BC = start_B.unsqueeze(1).expand(-1, n_beams), own_BC
    texts_BCT = ids_BC.unsqueeze(-1)[..., :0]
    # all beams start equal, so the first step expands only one
    scores_BC = torch.where(own_BC == 0, 0.0, -math.inf)
    for step in range(n_steps - 1):
        logits_MV = _without(next_logits(ids_BC.flatten(), (offset_B1 + parents_BC).flatten()), special.outside)
        log_probs_BCV = noisy(logits_MV, temperature).log_softmax(dim=-1).unflatten(0, (-1, n_beams))
        best_BC, index_BC = (scores_BC.unsqueeze(-1) + log_probs_BCV).flatten(1).topk(n_beams)
        is_open_B1 = (lengths_B > step + 1).unsqueeze(1)
        scores_BC = torch.where(is_open_B1, best_BC, scores_BC)
        parents_BC = torch.where(is_open_B1, index_BC // logits_MV.shape[-1], own_BC)
        ids_BC = torch.where(is_open_B1, index_BC % logits_MV.shape[-1], special.pad)
        texts_BCT = torch.cat(
            [texts_BCT.gather(1, parents_BC.unsqueeze(-1).expand_as(texts_BCT)), ids_BC[..., None]], -1
        )
    texts_BCT = nn.functional.pad(texts_BCT, (0, 1), value=special.pad)
    is_end_BT = torch.arange(n_steps, device=start_B.device) == lengths_B.unsqueeze(1) - 1
    return texts_BCT.masked_fill(is_end_BT.unsqueeze(1), special.eos)


def nearest_text(texts_BCT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return each document's text with the highest `ngram_f_score`, `(B, T)`; the first of equals."""
    # argmax does not guarantee the first of equals
    order_BC = ngram_f_score(texts_BCT, labels_BT).sort(dim=1, descending=True, stable=True).indices
    return texts_BCT[torch.arange(len(texts_BCT), device=texts_BCT.device), order_BC[:, 0]]


def ngram_f_score(texts_BCT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean F score `(B, C)` of n-grams of 1 to 4 ids between texts and targets of the same length, 0 to 1.

    Counts are clipped as in BLEU. Both sides have equally many n-grams, so precision, recall and F score are equal, and
    BLEU's brevity penalty has no effect. Positions without a target are ignored. Targets shorter than n score 0 for n.
    """
    is_counted_BT = labels_BT != IGNORED
    texts_BCT = texts_BCT.masked_fill(~is_counted_BT.unsqueeze(1), -1)
    # positions of each of the text's n-grams in the target and in the text itself
    in_target_BCTT = first = texts_BCT.unsqueeze(-1) == labels_BT[:, None, None]
    in_text_BCTT = first_in_text = texts_BCT.unsqueeze(-1) == texts_BCT.unsqueeze(-2)
    is_ngram_BT = is_counted_BT
    total_BC = torch.zeros(texts_BCT.shape[:2], device=texts_BCT.device)
    for n in range(1, min(LONGEST_NGRAM, labels_BT.shape[1]) + 1):
        if n > 1:
            in_target_BCTT = in_target_BCTT[..., :-1, :-1] & first[..., n - 1 :, n - 1 :]
            in_text_BCTT = in_text_BCTT[..., :-1, :-1] & first_in_text[..., n - 1 :, n - 1 :]
            is_ngram_BT = is_ngram_BT[:, :-1] & is_counted_BT[:, n - 1 :]
        # an n-gram twice in the text and once in the target counts one half at each of its positions
        found_BCT = (in_target_BCTT.sum(-1) / in_text_BCTT.sum(-1).clamp(min=1)).clamp(max=1)
        n_ngrams_B1 = is_ngram_BT.sum(-1, keepdim=True).clamp(min=1)
        total_BC += (found_BCT * is_ngram_BT.unsqueeze(1)).sum(-1) / n_ngrams_B1
    return total_BC / LONGEST_NGRAM


def mix_inputs(inputs_BT: Tensor, oracle_BT: Tensor, labels_BT: Tensor, gold_share: float) -> Tensor:
    """Replace each decoder input by the oracle's token with probability `1 - gold_share`.

    `inputs_BT` are the labels shifted to the right; the first id stays. `oracle_BT` is aligned with the labels.
    Positions without a target neither give nor get a token.
    """
    is_target_BT = labels_BT != IGNORED
    is_kept = torch.rand(labels_BT[:, 1:].shape, device=labels_BT.device) < gold_share
    is_replaced = is_target_BT[:, :-1] & is_target_BT[:, 1:] & ~is_kept
    words = torch.where(is_replaced, oracle_BT[:, :-1], inputs_BT[:, 1:])
    return torch.cat([inputs_BT[:, :1], words], dim=1)


def target_lengths(labels_BT: Tensor) -> Tensor:
    """Return the number of ids of each target up to its last, `(B,)`; 0 where there is none."""
    position_T = torch.arange(1, labels_BT.shape[1] + 1, device=labels_BT.device)
    return (position_T * (labels_BT != IGNORED)).amax(dim=1)


@contextlib.contextmanager
def caching(decoder: Any) -> Iterator[None]:
    """Disable gradient checkpointing and LayerDrop, so that the decoder can use a cache in training mode."""
    checkpointed = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    layerdrop, decoder.layerdrop = decoder.layerdrop, 0.0
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        decoder.layerdrop = layerdrop
        for module in checkpointed:
            module.gradient_checkpointing = True


def _without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    return logits.index_fill(-1, to_device(torch.tensor(ids), logits.device), -math.inf)
