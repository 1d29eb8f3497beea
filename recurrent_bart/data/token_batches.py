"""Batches of as many documents as there is room for: many short ones, few long ones."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

from recurrent_bart.data.batches import DocumentOrder

# documents that are grouped together; of a larger window batches would hold the same ones again and again
WINDOW = 4096


def group_by_segments(n_segments: Sequence[int], most: int) -> list[list[int]]:
    """Documents in batches of at most `most` segments, padding included; those with the most segments first.

    Args:
        n_segments: Number of segments of each document.
        most: Documents of a batch times segments of its longest one; a document that has more is a batch of its own.

    Returns:
        Batches of places in `n_segments`.
    """
    by_length = sorted(range(len(n_segments)), key=n_segments.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(by_length):
        size = max(1, most // n_segments[by_length[start]])
        batches.append(by_length[start : start + size])
        start += size
    return batches


class TokenBatchOrder(DocumentOrder):
    """Batches of up to the same number of segments, whatever the number of documents.

    Documents are shuffled in each round and, a window of them after the other, those of like length are grouped; then
    all batches of the round are shuffled. This sequence depends on the seed and the most segments of a batch alone;
    every document is in it once a round. Steps take as many batches as there are processes and accumulation steps, so a
    run that goes on with other processes repeats and leaves out none. Neither does one that goes on with batches of
    another size: what is left of the round is cut where it is too large, and later rounds are grouped anew.

    Args:
        n_segments: Number of segments of each document.
        most: Segments of a batch, padding included.
        n_batches: Batches of an optimizer step, over all processes and accumulation steps.
        seed: Of the order.
        first_step: A step whose place in the order is known.
        first_document: Documents read before it.
        first_most: Segments of a batch where its round began; `most` if not given.
    """

    def __init__(
        self,
        n_segments: Sequence[int],
        most: int,
        n_batches: int,
        seed: int,
        first_step: int = 0,
        first_document: int = 0,
        first_most: int | None = None,
    ):
        super().__init__(n_segments, seed, first_step, first_document)
        self.lengths, self.most, self.n_batches = list(n_segments), most, n_batches
        self.first_round, self.n_read = divmod(first_document, len(self.lengths))
        self.first_most = first_most or most
        # number of batches before each round, from the first one on, and the round that was last looked at
        self._begins = [0]
        self._cached: tuple[int, list[list[int]]] = (-1, [])

    def documents_before(self, step: int) -> int:
        """All but those that the step's round still has."""
        number, place = self._find(step)
        return (number + 1) * len(self.lengths) - sum(map(len, self._round(number)[place:]))

    def most_segments(self, step: int) -> int:
        """By which the round was grouped that a step begins in."""
        return self.first_most if self._find(step)[0] == self.first_round else self.most

    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Batches with the most segments first."""
        batches = list(itertools.islice(self._batches_from(step), self.n_batches))
        batches.sort(key=lambda documents: -self.lengths[documents[0]])
        return [batches[micro * world_size : (micro + 1) * world_size] for micro in range(accumulation)]

    def _batches_from(self, step: int) -> Iterator[list[int]]:
        first, place = self._find(step)
        for number in itertools.count(first):
            yield from self._round(number)[place:]
            place = 0

    def _find(self, step: int) -> tuple[int, int]:
        """Round that a step begins in, and how many of its batches come before."""
        batch = (step - self.first_step) * self.n_batches
        while self._begins[-1] <= batch:
            n_batches = len(self._round(self.first_round + len(self._begins) - 1))
            self._begins.append(self._begins[-1] + n_batches)
        index = bisect.bisect_right(self._begins, batch) - 1
        return self.first_round + index, batch - self._begins[index]

    def _round(self, number: int) -> list[list[int]]:
        """Batches of a round; of the first one, those that are not read."""
        if self._cached[0] != number:
            is_first = number == self.first_round
            batches = self._grouped(number, self.first_most if is_first else self.most)
            self._cached = number, self._unread(batches) if is_first else batches
        return self._cached[1]

    def _grouped(self, number: int, most: int) -> list[list[int]]:
        documents = self.permutation(len(self.lengths), "round", number).tolist()
        windows = (documents[start : start + WINDOW] for start in range(0, len(documents), WINDOW))
        batches = [batch for window in windows for batch in self._group(window, most)]
        return [batches[place] for place in self.permutation(len(batches), "batches", number).tolist()]

    def _group(self, documents: list[int], most: int) -> list[list[int]]:
        groups = group_by_segments([self.lengths[document] for document in documents], most)
        return [[documents[place] for place in group] for group in groups]

    def _unread(self, batches: list[list[int]]) -> list[list[int]]:
        unread, n_read = [], self.n_read
        for batch in batches:
            unread += self._group(batch[n_read:], self.most)
            n_read = max(0, n_read - len(batch))
        return unread
