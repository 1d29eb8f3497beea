"""Decoder inputs that are partly the model's own words, as they all are when it generates.

In training every word is predicted from the target's words before it, in generation from the model's own (exposure
bias). Here some words of the target are replaced in the input by an oracle's: words that the model would have written
there. What is to be predicted stays the target. Zhang et al., ACL 2019, arXiv 1906.02448.

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

ORACLES = ("none", "word", "sentence")
# n-grams up to this length are compared, as in BLEU
LONGEST_NGRAM = 4

# from the last id of each beam and the beam that it continues, scores (M, V) of what comes next
NextLogits = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Oracle:
    """Whose words a decoder reads, and how many of them.

    Attributes:
        kind: `"word"`: the best next word of a decoder pass over the target; `"sentence"`: words of the text nearest
            to the target that a beam search over texts of its length finds.
        gold_probability: Share of words that stay the target's; 1: all, and nothing is run for it.
        temperature: Scale of the Gumbel noise on scores; 0: none; 1: the word oracle draws from the model's own
            distribution.
        n_beams: Of the beam search.
        n_steps: Length of the longest target on any process, or more, so that all make as many decoder passes.
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
    """Ids that an oracle knows: how a text ends, what stands behind it, and what is never inside of one."""

    eos: int
    pad: int
    outside: tuple[int, ...]


def gold_probability(epoch: float, decay: float) -> float:
    """Share of the target's words after so many rounds through the documents: `mu / (mu + exp(epoch / mu))`.

    Args:
        epoch: Rounds, parts of one included.
        decay: mu, above 0. The share begins at `mu / (mu + 1)` and is a half after `mu * log(mu)` rounds.
    """
    # the same, but a number that does not overflow
    weight = decay * math.exp(-epoch / decay)
    return weight / (weight + 1)


def noisy(logits: Tensor, temperature: float) -> Tensor:
    """Scores with Gumbel noise of that scale, in float32 at least.

    The paper divides scores by the temperature after the noise is added, which leaves the order of words as it is.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not temperature:
        return precise
    # minus the logarithm of an exponential variable; that of a uniform one could be 0 and give infinity
    return precise - temperature * torch.empty_like(precise).exponential_().log()


def word_oracle(logits_BTV: Tensor, temperature: float, special: SpecialIds) -> Tensor:
    """The best next word `(B, T)` under noise.

    No word is an end or a pad: nothing is ever generated behind one.
    """
    return _without(noisy(logits_BTV, temperature), special.outside).argmax(dim=-1)


def sentence_oracle(
    next_logits: NextLogits, inputs_BT: Tensor, labels_BT: Tensor, oracle: Oracle, special: SpecialIds
) -> Tensor:
    """Of the texts of a beam search, the one nearest to the target `(B, T)`, word by word as long as it."""
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
    """Texts `(B, C, n_steps)` that end where they are told to, the likeliest first; pads stand behind the end.

    Args:
        next_logits: One decoder step; called `n_steps - 1` times, however short the texts are, for the end itself
            has not to be found.
        start_B: Id that the decoder begins with.
        lengths_B: Ids of each text, its end included; 0: there is none.
        n_steps: At least the longest of them.
        n_beams: C.
        temperature: Of the noise on each step's scores.
        special: Where eos comes last, and what comes nowhere.
    """
    own_BC = torch.arange(n_beams, device=start_B.device).expand(len(start_B), -1)
    offset_B1 = n_beams * torch.arange(len(start_B), device=start_B.device).unsqueeze(1)
    ids_BC, parents_BC = start_B.unsqueeze(1).expand(-1, n_beams), own_BC
    texts_BCT = ids_BC.unsqueeze(-1)[..., :0]
    # all beams are one at first
    scores_BC = torch.where(own_BC == 0, 0.0, -math.inf)
    for step in range(n_steps - 1):
        logits_MV = _without(next_logits(ids_BC.flatten(), (offset_B1 + parents_BC).flatten()), special.outside)
        log_probs_BCV = noisy(logits_MV, temperature).log_softmax(dim=-1).unflatten(0, (-1, n_beams))
        best_BC, places_BC = (scores_BC.unsqueeze(-1) + log_probs_BCV).flatten(1).topk(n_beams)
        is_open_B1 = (lengths_B > step + 1).unsqueeze(1)
        scores_BC = torch.where(is_open_B1, best_BC, scores_BC)
        parents_BC = torch.where(is_open_B1, places_BC // logits_MV.shape[-1], own_BC)
        ids_BC = torch.where(is_open_B1, places_BC % logits_MV.shape[-1], special.pad)
        texts_BCT = torch.cat(
            [texts_BCT.gather(1, parents_BC.unsqueeze(-1).expand_as(texts_BCT)), ids_BC[..., None]], -1
        )
    texts_BCT = nn.functional.pad(texts_BCT, (0, 1), value=special.pad)
    is_end_BT = torch.arange(n_steps, device=start_B.device) == lengths_B.unsqueeze(1) - 1
    return texts_BCT.masked_fill(is_end_BT.unsqueeze(1), special.eos)


def nearest_text(texts_BCT: Tensor, labels_BT: Tensor) -> Tensor:
    """Of each document's texts the one with the highest `ngram_f_score` `(B, T)`; of equals the first."""
    # argmax does not promise which one of equals it gives
    order_BC = ngram_f_score(texts_BCT, labels_BT).sort(dim=1, descending=True, stable=True).indices
    return texts_BCT[torch.arange(len(texts_BCT), device=texts_BCT.device), order_BC[:, 0]]


def ngram_f_score(texts_BCT: Tensor, labels_BT: Tensor) -> Tensor:
    """How near texts `(B, C)` are to targets of the same length: mean F score of n-grams of 1 to 4 ids, 0 to 1.

    Each n-gram is found as often as it stands in both. As both have the same number of n-grams, precision, recall and
    F score are one, and the brevity penalty of BLEU has nothing to do. Positions without a target count in neither;
    lengths of which the target has no n-gram count 0.
    """
    is_counted_BT = labels_BT != IGNORED
    texts_BCT = texts_BCT.masked_fill(~is_counted_BT.unsqueeze(1), -1)
    # where a text's n-gram stands in the target, and in the text itself
    in_target_BCTT = first = texts_BCT.unsqueeze(-1) == labels_BT[:, None, None]
    in_text_BCTT = first_in_text = texts_BCT.unsqueeze(-1) == texts_BCT.unsqueeze(-2)
    is_ngram_BT = is_counted_BT
    total_BC = torch.zeros(texts_BCT.shape[:2], device=texts_BCT.device)
    for n in range(1, min(LONGEST_NGRAM, labels_BT.shape[1]) + 1):
        if n > 1:
            in_target_BCTT = in_target_BCTT[..., :-1, :-1] & first[..., n - 1 :, n - 1 :]
            in_text_BCTT = in_text_BCTT[..., :-1, :-1] & first_in_text[..., n - 1 :, n - 1 :]
            is_ngram_BT = is_ngram_BT[:, :-1] & is_counted_BT[:, n - 1 :]
        # an n-gram that stands twice in the text and once in the target is half found at each of its places
        found_BCT = (in_target_BCTT.sum(-1) / in_text_BCTT.sum(-1).clamp(min=1)).clamp(max=1)
        n_ngrams_B1 = is_ngram_BT.sum(-1, keepdim=True).clamp(min=1)
        total_BC += (found_BCT * is_ngram_BT.unsqueeze(1)).sum(-1) / n_ngrams_B1
    return total_BC / LONGEST_NGRAM


def mix_inputs(inputs_BT: Tensor, oracle_BT: Tensor, labels_BT: Tensor, gold_share: float) -> Tensor:
    """Decoder inputs with an oracle's words for some of the target's; a coin is thrown for each.

    Args:
        inputs_BT: Labels shifted to the right. The first id stays.
        oracle_BT: The word of each position of the target, read at the next one.
        labels_BT: Where there is no target, no input is replaced, and no word is taken.
        gold_share: Probability that an input stays.
    """
    is_target_BT = labels_BT != IGNORED
    is_kept = torch.rand(labels_BT[:, 1:].shape, device=labels_BT.device) < gold_share
    is_replaced = is_target_BT[:, :-1] & is_target_BT[:, 1:] & ~is_kept
    words = torch.where(is_replaced, oracle_BT[:, :-1], inputs_BT[:, 1:])
    return torch.cat([inputs_BT[:, :1], words], dim=1)


def target_lengths(labels_BT: Tensor) -> Tensor:
    """Ids of each target up to its last, 0 where there is none: `(B,)`."""
    place_T = torch.arange(1, labels_BT.shape[1] + 1, device=labels_BT.device)
    return (place_T * (labels_BT != IGNORED)).amax(dim=1)


@contextlib.contextmanager
def caching(decoder: Any) -> Iterator[None]:
    """Let a decoder be run with a cache while it is in training mode, dropout on.

    Under gradient checkpointing Hugging Face's layers drop the cache, and under LayerDrop a layer misses words.
    """
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
    """Scores under which these ids are never chosen."""
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -math.inf)
