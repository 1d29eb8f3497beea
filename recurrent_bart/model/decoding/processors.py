"""Hugging Face's logits processors without synchronization, where their own code reads lengths or tokens on the CPU.

Shape suffixes: R texts, T target length, V vocabulary, W starts of n-grams.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

# ids (R, T), the position of the last token (1,), and scores (R, V) to new scores
Process = Callable[[Tensor, Tensor, Tensor], Tensor]

# Hugging Face's own code of these reads only scores, and does not synchronize
SCORE_PROCESSORS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.LogitNormalization,
)


class DeviceProcessors:
    """Logits processors of one call of `generate`.

    Attributes:
        is_capturable: True if a CUDA graph can hold all processors. Otherwise all run as Hugging Face's own code, which
            gets the ids so far.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int, device: torch.device):
        self.device = device
        self.processors = processors
        built = [_on_device(processor, vocab_size, device) for processor in processors]
        self.steps = [process for process in built if process is not None]
        self.is_capturable = len(self.steps) == len(built)

    def __call__(self, ids_RT: Tensor, position: Tensor, scores_RV: Tensor) -> Tensor:
        """Return the processed scores; `scores_RV` may be overwritten."""
        if not self.is_capturable:
            return self.processors(ids_RT[:, : int(position) + 1], scores_RV)
        for process in self.steps:
            scores_RV = process(ids_RT, position, scores_RV)
        return scores_RV

    def key(self) -> Hashable:
        """Return a key of all constants that a CUDA graph holds. A graph is used again only with equal constants."""
        if not self.is_capturable:
            return "not captured"
        return tuple((type(part).__name__, _constants(part)) for part in self.processors)


def _constants(processor: Any) -> Hashable:
    values = ((name, part.tolist() if torch.is_tensor(part) else part) for name, part in vars(processor).items())
    return tuple(sorted((name, str(value)) for name, value in values))


def _on_device(processor: Any, vocab_size: int, device: torch.device) -> Process | None:
    """Return a processor's work as a function that does not synchronize; None if there is no function for it."""
    kind = type(processor)
    if kind in SCORE_PROCESSORS:
        return lambda ids_RT, position, scores_RV: processor(None, scores_RV)
    build = BUILDERS.get(kind)
    return None if build is None else build(processor, vocab_size, device)


def _min_length(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return _Suppressed(processor.eos_token_id, vocab_size, device, before=processor.min_length)


def _min_new_tokens(processor: Any, vocab_size: int, device: torch.device) -> Process:
    before = processor.prompt_length_to_skip + processor.min_new_tokens
    return _Suppressed(processor.eos_token_id, vocab_size, device, before=before)


def _suppressed(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return _Suppressed(processor.suppress_tokens, vocab_size, device)


def _suppressed_at_begin(processor: Any, vocab_size: int, device: torch.device) -> Process:
    begin = processor.begin_index
    return _Suppressed(processor.begin_suppress_tokens, vocab_size, device, before=begin + 1, start=begin)


def _forced_bos(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return _Forced([processor.bos_token_id], vocab_size, device, length=1)


def _forced_eos(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return _Forced(processor.eos_token_id.tolist(), vocab_size, device, length=processor.max_length - 1)


def _finite(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return lambda ids_RT, position, scores_RV: scores_RV.nan_to_num_(0.0)


def _repetition(processor: Any, vocab_size: int, device: torch.device) -> Process | None:
    # a prompt's length for each row comes with decoder_attention_mask
    return _Repetition(processor.penalty) if processor.prompt_ignore_length is None else None


def _no_repeat(processor: Any, vocab_size: int, device: torch.device) -> Process:
    return _NoRepeat(processor.ngram_size)


BUILDERS: dict[type, Callable[[Any, int, torch.device], Process | None]] = {
    logits_process.MinLengthLogitsProcessor: _min_length,
    logits_process.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    logits_process.SuppressTokensLogitsProcessor: _suppressed,
    logits_process.SuppressTokensAtBeginLogitsProcessor: _suppressed_at_begin,
    logits_process.ForcedBOSTokenLogitsProcessor: _forced_bos,
    logits_process.ForcedEOSTokenLogitsProcessor: _forced_eos,
    logits_process.InfNanRemoveLogitsProcessor: _finite,
    logits_process.RepetitionPenaltyLogitsProcessor: _repetition,
    logits_process.NoRepeatNGramLogitsProcessor: _no_repeat,
}


class _Suppressed:
    """Minus infinity for some tokens while the text's length is at least `start` and below `before`."""

    def __init__(
        self, tokens: Tensor, vocab_size: int, device: torch.device, before: int | None = None, start: int = 0
    ):
        # Hugging Face ignores ids outside the vocabulary
        inside = sorted({token for token in tokens.tolist() if 0 <= token < vocab_size})
        self.tokens = torch.tensor(inside, dtype=torch.long, device=device)
        self.before, self.start = before, start

    def __call__(self, ids_RT: Tensor, position: Tensor, scores_RV: Tensor) -> Tensor:
        if self.before is None:
            return scores_RV.index_fill_(1, self.tokens, -torch.inf)
        is_active = position < self.before - 1
        if self.start:
            is_active &= position >= self.start - 1
        chosen = scores_RV.index_select(1, self.tokens).masked_fill(is_active, -torch.inf)
        return scores_RV.index_copy_(1, self.tokens, chosen)


class _Forced:
    """Zero for the forced tokens and minus infinity for all else, at one length of the text."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, device: torch.device, length: int):
        self.scores_V = torch.full((vocab_size,), -torch.inf, device=device)
        self.scores_V[torch.tensor(tokens, device=device)] = 0.0
        self.length = length

    def __call__(self, ids_RT: Tensor, position: Tensor, scores_RV: Tensor) -> Tensor:
        return torch.where(position + 1 == self.length, self.scores_V, scores_RV)


class _Repetition:
    """Penalty for all tokens that a text already has."""

    def __init__(self, penalty: float):
        self.penalty = penalty

    def __call__(self, ids_RT: Tensor, position: Tensor, scores_RV: Tensor) -> Tensor:
        columns_T = torch.arange(ids_RT.shape[1], device=ids_RT.device)
        # columns without a token repeat the first token, and the same score is written twice
        seen_RT = torch.where(columns_T <= position, ids_RT, ids_RT[:, :1])
        score_RT = scores_RV.gather(1, seen_RT)
        score_RT = torch.where(score_RT < 0, score_RT * self.penalty, score_RT / self.penalty)
        return scores_RV.scatter_(1, seen_RT, score_RT)


class _NoRepeat:
    """Minus infinity for tokens that would repeat an n-gram of their text."""

    def __init__(self, ngram_size: int):
        self.n_before = ngram_size - 1

    def __call__(self, ids_RT: Tensor, position: Tensor, scores_RV: Tensor) -> Tensor:
        n_starts = ids_RT.shape[1] - self.n_before
        if n_starts < 1:
            return scores_RV
        device = ids_RT.device
        start_W = torch.arange(n_starts, device=device)
        is_repeated_RW = (start_W + self.n_before <= position).expand(len(ids_RT), -1)
        for offset in range(self.n_before):
            # the tokens before the next one, which end at `position`
            last_R1 = ids_RT.index_select(1, (position - self.n_before + 1 + offset).clamp(min=0))
            is_repeated_RW = is_repeated_RW & (ids_RT[:, offset : offset + n_starts] == last_R1)
        # one more column for starts whose n-gram is not repeated
        n_tokens = scores_RV.shape[1]
        token_RW = ids_RT[:, self.n_before :].masked_fill(~is_repeated_RW, n_tokens)
        is_banned = torch.zeros(len(ids_RT), n_tokens + 1, dtype=torch.bool, device=device)
        return scores_RV.masked_fill_(is_banned.scatter_(1, token_RW, True)[:, :n_tokens], -torch.inf)
