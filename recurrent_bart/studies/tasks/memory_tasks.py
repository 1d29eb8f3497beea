"""Memory tasks. The end of a document asks for tokens of earlier segments.

Every task draws documents from a random generator, in unlimited number. The same seed gives the same documents.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, M groups of tokens, W tokens in a
group.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from recurrent_bart.model.loss import IGNORED

BOS, PAD, EOS, MARK = range(4)
# id 4 is unused; changing this would change the documents of studies/LOG.md
FIRST_SYMBOL = 5


class Accuracy(NamedTuple):
    """Share of answers that are correct in all tokens, and share of correct tokens."""

    exact_match: float
    token_accuracy: float


def score(predicted_BT: Tensor, labels_BT: Tensor) -> Accuracy:
    """Compare predicted ids with the answers. Predictions are generated, or most likely under teacher forcing."""
    is_target_BT = labels_BT != IGNORED
    is_right_BT = (predicted_BT == labels_BT) & is_target_BT
    exact = (is_right_BT == is_target_BT).all(dim=1).double().mean()
    return Accuracy(float(exact), float(is_right_BT.sum() / is_target_BT.sum()))


class MemoryTask(ABC):
    """Source of documents with any number of segments and one answer per document."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ids included."""

    @abstractmethod
    def target_length(self, n_segments: int) -> int:
        """Return the number of tokens of the longest answer to a document with `n_segments` segments."""

    @abstractmethod
    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """Draw documents on the generator's device.

        Returns:
            `input_ids (B, N, L)` without padding, and `labels (B, T)`, padded with -100.

        Raises:
            ValueError: The document is too short for the task.
        """

    def answer_places(self, segment_size: int) -> slice | None:
        """Return the positions in the last segment that ask for the answer, one per token, or None without them."""
        return None


@dataclass(frozen=True)
class SymbolTask(MemoryTask):
    """Task with random ids: `n_symbols` ids are symbols that matter, `n_fillers` ids are fillers without meaning."""

    n_symbols: int = 32
    n_fillers: int = 32

    @property
    def vocab_size(self) -> int:
        """Number of ids: special ids, symbols and fillers."""
        return FIRST_SYMBOL + self.n_symbols + self.n_fillers

    def fillers(self, generator: Generator, *shape: int) -> Tensor:
        """Draw ids of fillers."""
        return _draw(generator, FIRST_SYMBOL + self.n_symbols, self.vocab_size, *shape)

    def symbols(self, generator: Generator, *shape: int) -> Tensor:
        """Draw ids of symbols."""
        return _draw(generator, FIRST_SYMBOL, FIRST_SYMBOL + self.n_symbols, *shape)


@dataclass(frozen=True)
class Copy(SymbolTask):
    """Task: repeat the `n_payload` symbols at the start of the document."""

    n_payload: int = 24

    def target_length(self, n_segments: int) -> int:
        """Return the number of payload symbols."""
        return self.n_payload

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        _check_room(self.n_payload, segment_size)
        input_ids = self.fillers(generator, batch_size, n_segments, segment_size)
        payload_BT = self.symbols(generator, batch_size, self.n_payload)
        input_ids[:, 0, : self.n_payload] = payload_BT
        return input_ids, payload_BT


@dataclass(frozen=True)
class Recall(SymbolTask):
    """Task: list, in order, each symbol that follows a mark. Every segment has `n_marked` marks and no fillers."""

    n_fillers: int = 0
    n_marked: int = 4

    def target_length(self, n_segments: int) -> int:
        """Return the number of marked symbols in all segments."""
        return n_segments * self.n_marked

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        n_places = segment_size // 2
        _check_room(self.n_marked, n_places)
        input_ids = self.symbols(generator, batch_size, n_segments, segment_size)
        marked = self.symbols(generator, batch_size, n_segments, self.n_marked)
        runs = torch.stack([torch.full_like(marked, MARK), marked], dim=-1)
        places = _distinct(generator, n_places, self.n_marked, batch_size, n_segments).sort(dim=-1).values
        # in this call, every segment is one document of `_write`
        _write(input_ids.view(-1, 1, segment_size), places.flatten(0, 1), runs.flatten(0, 1))
        return input_ids, marked.flatten(1)


@dataclass(frozen=True)
class Retrieval(SymbolTask):
    """Task: return the values of queried keys. Pairs of key and value are at random positions, queries at the end.

    A query is a mark and a key. Half of the symbols are keys, distinct within a document. The other half are values.

    Attributes:
        n_pairs: Pairs in a document.
        n_queries: Number of pairs that are queried.
        is_denoising: Query as in BART's pre-training: a mark replaces the key's value, and the pair is the answer.
    """

    n_pairs: int = 8
    n_queries: int = 8
    is_denoising: bool = False

    def __post_init__(self) -> None:
        if not self.n_queries <= self.n_pairs <= self.n_symbols // 2:
            raise ValueError(
                f"n_queries={self.n_queries}, n_pairs={self.n_pairs}: n_queries must be at most n_pairs, and n_pairs "
                f"at most half of n_symbols={self.n_symbols}"
            )

    def target_length(self, n_segments: int) -> int:
        """Return one token (a value) or two tokens (a pair) per query."""
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
        # Pairs lie at random positions, so the first n_queries pairs are a random choice.
        asked_BT = keys_BM[:, : self.n_queries]
        end_T = torch.arange(n_places, n_places + self.n_queries, device=generator.device)
        query = asked_BT, torch.full_like(asked_BT, MARK)
        _write(input_ids, end_T.expand(batch_size, -1), torch.stack(query if self.is_denoising else query[::-1], -1))
        answers_BT = values_BM[:, : self.n_queries]
        if self.is_denoising:
            answers_BT = torch.stack([asked_BT, answers_BT], dim=-1).flatten(1)
        return input_ids, answers_BT

    def answer_places(self, segment_size: int) -> slice | None:
        """Return the positions of the queried keys. With `is_denoising`, return positions of keys and marks."""
        n_places = segment_size // 2
        first = 2 * (n_places - self.n_queries)
        return slice(first, 2 * n_places) if self.is_denoising else slice(first + 1, 2 * n_places, 2)


SYMBOL_TASKS: dict[str, type[SymbolTask]] = {
    "copy": Copy,
    "recall": Recall,
    "retrieval": Retrieval,
}


def _check_room(n_needed: int, n_places: int) -> None:
    if n_needed > n_places:
        raise ValueError(f"the task needs {n_needed} positions, but the document or segment has {n_places}")


def _draw(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def _distinct(generator: Generator, n: int, n_drawn: int, *shape: int) -> Tensor:
    """Draw `n_drawn` distinct numbers below `n` in random order, `(*shape, n_drawn)`."""
    return torch.rand(*shape, n, generator=generator, device=generator.device).topk(n_drawn).indices


def _write(input_ids_BNL: Tensor, places_BM: Tensor, runs_BMW: Tensor) -> None:
    """Write groups of W tokens. Segments are divided into cells of W tokens; `places_BM` are indices of cells."""
    length, width = input_ids_BNL.shape[-1], runs_BMW.shape[-1]
    per_segment = length // width
    starts_BM = places_BM // per_segment * length + places_BM % per_segment * width
    positions_BMW = starts_BM.unsqueeze(-1) + torch.arange(width, device=starts_BM.device)
    # `view` shares memory with the documents; `reshape` might write to a copy
    input_ids_BNL.view(len(input_ids_BNL), -1).scatter_(1, positions_BMW.flatten(1), runs_BMW.flatten(1))
