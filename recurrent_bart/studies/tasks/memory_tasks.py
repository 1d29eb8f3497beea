"""Tasks that nothing but memory solves: what is asked at the end was said in segments before.

Every task draws its documents from a generator: the same seed gives the same documents, and there is no end of them.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, M runs of tokens, W tokens in a run.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from recurrent_bart.model.loss import IGNORED

BOS, PAD, EOS, MARK, OTHER_MARK = range(5)
FIRST_SYMBOL = 5


class Accuracy(NamedTuple):
    """How many answers are right: whole ones, and their tokens."""

    exact_match: float
    token_accuracy: float


def score(predicted_BT: Tensor, labels_BT: Tensor) -> Accuracy:
    """Compare predictions, generated or the most likely ids under teacher forcing, with the answers."""
    is_target_BT = labels_BT != IGNORED
    is_right_BT = (predicted_BT == labels_BT) & is_target_BT
    exact = (is_right_BT == is_target_BT).all(dim=1).double().mean()
    return Accuracy(float(exact), float(is_right_BT.sum() / is_target_BT.sum()))


class MemoryTask(ABC):
    """Documents of any number of segments, each with one answer."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @abstractmethod
    def target_length(self, n_segments: int) -> int:
        """Tokens of the longest answer to a document of so many segments."""

    @abstractmethod
    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """Draw documents, on the generator's device.

        Returns:
            `input_ids (B, N, L)`, every position a token, and `labels (B, T)`, -100 behind an answer.

        Raises:
            ValueError: What the task places does not fit the document.
        """

    def answer_places(self, segment_size: int) -> slice | None:
        """Where in the last segment each token of the answer is asked for; None: in no place of its own."""
        return None


@dataclass(frozen=True)
class SymbolTask(MemoryTask):
    """Documents of symbols among fillers, which are other ids and mean nothing.

    Attributes:
        n_symbols: Number of different symbols.
        n_fillers: Number of different fillers.
    """

    n_symbols: int = 32
    n_fillers: int = 32

    @property
    def vocab_size(self) -> int:
        """Special ids, symbols, fillers."""
        return FIRST_SYMBOL + self.n_symbols + self.n_fillers

    def fillers(self, generator: Generator, *shape: int) -> Tensor:
        """Random fillers."""
        return _draw(generator, FIRST_SYMBOL + self.n_symbols, self.vocab_size, *shape)

    def symbols(self, generator: Generator, *shape: int) -> Tensor:
        """Random symbols."""
        return _draw(generator, FIRST_SYMBOL, FIRST_SYMBOL + self.n_symbols, *shape)


@dataclass(frozen=True)
class Copy(SymbolTask):
    """The first segment begins with a payload, to be given back after all others are read.

    Attributes:
        n_payload: Its symbols.
    """

    n_payload: int = 24

    def target_length(self, n_segments: int) -> int:
        """The payload's."""
        return self.n_payload

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        _check_room(self.n_payload, segment_size)
        input_ids = self.fillers(generator, batch_size, n_segments, segment_size)
        payload_BT = self.symbols(generator, batch_size, self.n_payload)
        input_ids[:, 0, : self.n_payload] = payload_BT
        return input_ids, payload_BT


@dataclass(frozen=True)
class Reverse(Copy):
    """Identical to Copy except: the payload is given back from its end."""

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        input_ids, payload_BT = super().batch(generator, batch_size, n_segments, segment_size)
        return input_ids, payload_BT.flip(1)


@dataclass(frozen=True)
class Recall(SymbolTask):
    """Some symbols of every segment have a mark in front; all of those, in order, are the answer. No fillers.

    Attributes:
        n_marked: Marked symbols of a segment.
    """

    n_fillers: int = 0
    n_marked: int = 4

    def target_length(self, n_segments: int) -> int:
        """All segments' marked symbols."""
        return n_segments * self.n_marked

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        n_places = segment_size // 2
        _check_room(self.n_marked, n_places)
        input_ids = self.symbols(generator, batch_size, n_segments, segment_size)
        marked = self.symbols(generator, batch_size, n_segments, self.n_marked)
        runs = torch.stack([torch.full_like(marked, MARK), marked], dim=-1)
        places = _distinct(generator, n_places, self.n_marked, batch_size, n_segments).sort(dim=-1).values
        # every segment is a document of its own here
        _write(input_ids.view(-1, 1, segment_size), places.flatten(0, 1), runs.flatten(0, 1))
        return input_ids, marked.flatten(1)


@dataclass(frozen=True)
class Retrieval(SymbolTask):
    """Pairs of a key and a value anywhere; at the end a mark and a key for each query, whose value is the answer.

    Half of the symbols are keys, no two of a document the same, half are values.

    Attributes:
        n_pairs: Pairs of a document.
        n_queries: How many of them are asked for.
        is_denoising: Ask as BART is trained: a key and a mark in its value's stead, and the answer is the pair.
    """

    n_pairs: int = 8
    n_queries: int = 8
    is_denoising: bool = False

    def __post_init__(self) -> None:
        if not self.n_queries <= self.n_pairs <= self.n_symbols // 2:
            raise ValueError(
                f"n_queries={self.n_queries}, n_pairs={self.n_pairs}: at most n_pairs queries, and at most half of "
                f"n_symbols={self.n_symbols} pairs"
            )

    def target_length(self, n_segments: int) -> int:
        """A value or a pair for each query."""
        return (1 + self.is_denoising) * self.n_queries

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        n_places = n_segments * (segment_size // 2) - self.n_queries
        _check_room(self.n_queries, segment_size // 2)
        _check_room(self.n_pairs, n_places)
        input_ids = self.fillers(generator, batch_size, n_segments, segment_size)
        n_keys = self.n_symbols // 2
        keys_BM = FIRST_SYMBOL + _distinct(generator, n_keys, self.n_pairs, batch_size)
        values_BM = _draw(generator, FIRST_SYMBOL + n_keys, FIRST_SYMBOL + self.n_symbols, batch_size, self.n_pairs)
        places_BM = _distinct(generator, n_places, self.n_pairs, batch_size)
        _write(input_ids, places_BM, torch.stack([keys_BM, values_BM], dim=-1))
        # pairs lie at random places, so which come first is no matter
        asked_BT = keys_BM[:, : self.n_queries]
        end_T = torch.arange(n_places, n_places + self.n_queries, device=generator.device)
        query = asked_BT, torch.full_like(asked_BT, MARK)
        _write(input_ids, end_T.expand(batch_size, -1), torch.stack(query if self.is_denoising else query[::-1], -1))
        answers_BT = values_BM[:, : self.n_queries]
        if self.is_denoising:
            answers_BT = torch.stack([asked_BT, answers_BT], dim=-1).flatten(1)
        return input_ids, answers_BT

    def answer_places(self, segment_size: int) -> slice | None:
        """The keys that are asked for; with denoising, all of the questions."""
        n_places = segment_size // 2
        first = 2 * (n_places - self.n_queries)
        return slice(first, 2 * n_places) if self.is_denoising else slice(first + 1, 2 * n_places, 2)


@dataclass(frozen=True)
class Needle(SymbolTask):
    """Somewhere stands a mark with a payload, the answer; elsewhere others, behind another mark.

    Attributes:
        n_payload: Symbols of each.
        n_distractors: Payloads behind the other mark.
    """

    n_payload: int = 4
    n_distractors: int = 3

    def target_length(self, n_segments: int) -> int:
        """The payload's."""
        return self.n_payload

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        n_runs, n_places = 1 + self.n_distractors, n_segments * (segment_size // (1 + self.n_payload))
        _check_room(n_runs, n_places)
        input_ids = self.fillers(generator, batch_size, n_segments, segment_size)
        payloads = self.symbols(generator, batch_size, n_runs, self.n_payload)
        marks = torch.full_like(payloads[..., :1], OTHER_MARK)
        marks[:, 0] = MARK
        places_BM = _distinct(generator, n_places, n_runs, batch_size)
        _write(input_ids, places_BM, torch.cat([marks, payloads], dim=-1))
        return input_ids, payloads[:, 0]


SYMBOL_TASKS: dict[str, type[SymbolTask]] = {
    "copy": Copy,
    "reverse": Reverse,
    "recall": Recall,
    "retrieval": Retrieval,
    "needle": Needle,
}


def _check_room(n_needed: int, n_places: int) -> None:
    if n_needed > n_places:
        raise ValueError(f"{n_needed} places are needed, the document or segment has {n_places}")


def _draw(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def _distinct(generator: Generator, n: int, n_drawn: int, *shape: int) -> Tensor:
    """Of 0 to n, `n_drawn` different numbers in random order, `(*shape, n_drawn)`."""
    return torch.rand(*shape, n, generator=generator, device=generator.device).topk(n_drawn).indices


def _write(input_ids_BNL: Tensor, places_BM: Tensor, runs_BMW: Tensor) -> None:
    """Write runs of tokens at places of their width, counted through the document; no run goes across segments."""
    length, width = input_ids_BNL.shape[-1], runs_BMW.shape[-1]
    per_segment = length // width
    starts_BM = places_BM // per_segment * length + places_BM % per_segment * width
    positions_BMW = starts_BM.unsqueeze(-1) + torch.arange(width, device=starts_BM.device)
    # a view, so that the document itself is written
    input_ids_BNL.view(len(input_ids_BNL), -1).scatter_(1, positions_BMW.flatten(1), runs_BMW.flatten(1))
