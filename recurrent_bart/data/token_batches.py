"""Batches with a limit on the number of segments, so a batch has many short documents or few long documents."""

import bisect
import itertools
from collections.abc import Iterator, Sequence

from recurrent_bart.data.batches import DocumentOrder

# Number of documents that are grouped together. A larger number would group the same documents in every epoch.
WINDOW = 4096


def group_by_segments(n_segments: Sequence[int], most: int) -> list[list[int]]:
    """Group document indices into batches of at most `most` segments, padding included. Longer documents stay alone."""
    by_length = sorted(range(len(n_segments)), key=n_segments.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(by_length):
        size = max(1, most // n_segments[by_length[start]])
        batches.append(by_length[start : start + size])
        start += size
    return batches


class TokenBatchOrder(DocumentOrder):
    """Document order that limits the number of segments in each batch, not the number of documents.

    Each epoch shuffles the documents, groups documents of similar length within each `WINDOW` consecutive documents,
    and shuffles the batches. The sequence depends only on the seed and `most`, and contains every document once per
    epoch. A step takes `n_batches` batches, so a run resumed with another number of ranks repeats no document and skips
    none. A run resumed with another `most` also repeats and skips no document: the rest of the epoch is grouped again,
    and later epochs use the new limit.

    Args (see also `DocumentOrder`):
        most: Maximum number of segments of a batch, padding included.
        n_batches: Number of batches in an optimizer step, over all ranks and accumulation steps.
        first_most: Value of `most` at the start of the first epoch; default: `most`.
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
        # `_begins`: number of batches before each epoch. `_cached`: number and batches of the cached epoch.
        self._begins = [0]
        self._cached: tuple[int, list[list[int]]] = (-1, [])

    def documents_before(self, step: int) -> int:
        """Return the number of documents read before `step`: all epochs so far, minus the unread documents."""
        number, place = self._find(step)
        return (number + 1) * len(self.lengths) - sum(map(len, self._round(number)[place:]))

    def steps_to_read(self, n_documents: int) -> int:
        """Return the number of steps that read `n_documents` documents, the last step in full."""
        n_batches = 0
        n_missing = n_documents - self.first_round * len(self.lengths) - self.n_read
        for number in itertools.count(self.first_round):
            for batch in self._round(number):
                if n_missing <= 0:
                    return self.first_step - (-n_batches // self.n_batches)
                n_batches += 1
                n_missing -= len(batch)
        raise AssertionError("epochs do not end")

    def most_segments(self, step: int) -> int:
        """Return the segment limit of the epoch in which `step` begins."""
        return self.first_most if self._find(step)[0] == self.first_round else self.most

    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Return the batches of a step by decreasing number of segments."""
        batches = list(itertools.islice(self._batches_from(step), self.n_batches))
        batches.sort(key=lambda documents: -self.lengths[documents[0]])
        return [batches[micro * world_size : (micro + 1) * world_size] for micro in range(accumulation)]

    def _batches_from(self, step: int) -> Iterator[list[int]]:
        first, place = self._find(step)
        for number in itertools.count(first):
            yield from self._round(number)[place:]
            place = 0

    def _find(self, step: int) -> tuple[int, int]:
        """Return the epoch in which `step` begins, and the number of batches of this epoch before `step`."""
        batch = (step - self.first_step) * self.n_batches
        while self._begins[-1] <= batch:
            n_batches = len(self._round(self.first_round + len(self._begins) - 1))
            self._begins.append(self._begins[-1] + n_batches)
        index = bisect.bisect_right(self._begins, batch) - 1
        return self.first_round + index, batch - self._begins[index]

    def _round(self, number: int) -> list[list[int]]:
        """Return the batches of an epoch. For the first epoch, return only the unread batches."""
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
