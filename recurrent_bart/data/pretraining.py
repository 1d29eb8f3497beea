"""Pretraining tasks on texts without summaries: every segment has a target that is made of the text itself.

- `"denoise"`: BART's text infilling (Lewis et al., ACL 2020). Each segment loses spans of its tokens; its target is the
  whole segment, up to the decoder's number of positions.
- `"recall"`: each segment ends with a cue, a few tokens from an earlier segment; its target is the text that followed
  the cue. A decoder that sees only the last segment can take this text from the state alone.
"""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recurrent_bart.data.batches import Collator, DocumentPlan

# Share of a segment's tokens that are removed, and mean length of a removed span, as in BART.
MASKED_SHARE = 0.3
MEAN_SPAN = 3.0
# Tokens of a cue.
CUE = 8


@dataclass(frozen=True)
class PretrainingCollator(Collator):
    """Collator that makes the targets of a text while it cuts the text into segments.

    The draws of a row depend on its `index` and its field `drawn_at`, so a resumed run makes the same segments.
    `segment_size` and `max_n_segments` of `sizes` are used; segments do not overlap.

    Attributes:
        mask_token_id: Id in place of a removed span, and in front of a cue.
    """

    mask_token_id: int = -1

    @property
    def room(self) -> int:
        """Tokens of the text in a segment."""
        around = len(self.leading) + len(self.trailing)
        return self.sizes.segment_size - around - (CUE + 1 if self.task == "recall" else 0)

    @property
    def target_room(self) -> int:
        """Tokens of the text in a target."""
        leading, trailing = self.around_targets or (self.leading, self.trailing)
        return self.max_target_length - len(leading) - len(trailing)

    def segments(self, row: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Return a text's segments with their targets, drawn anew for each `drawn_at`."""
        draw = random.Random(f"{row.get('drawn_at', '')} {row['index']}")
        cap = row.get("max_n_segments", self.sizes.max_n_segments)
        ids = [id for section in row["sections"] for id in section]
        pieces = [ids[begin : begin + self.room] for begin in range(0, len(ids), self.room)]
        pieces = pieces if cap == -1 else pieces[:cap]
        if self.task == "denoise":
            pairs = [(infill(piece, self.mask_token_id, draw), piece) for piece in pieces]
        else:
            pairs = list(self._recalled(pieces, draw))
        return [[*self.leading, *read, *self.trailing] for read, _ in pairs], [self.target(own) for _, own in pairs]

    def _recalled(self, pieces: list[list[int]], draw: random.Random) -> Iterator[tuple[list[int], list[int]]]:
        for number, piece in enumerate(pieces):
            if number == 0:
                yield piece, []
                continue
            earlier = pieces[draw.randrange(number)]
            begin = draw.randrange(len(earlier) - CUE)
            end = begin + CUE
            yield [*piece, self.mask_token_id, *earlier[begin:end]], earlier[end:]

    def plan(self, rows: Mapping[str, Any]) -> DocumentPlan:
        """Plan the texts of `load_corpus`, given by column. Raise ValueError if a segment is too short for the task."""
        least = 1 if self.task == "denoise" else CUE + 1
        if self.room < least:
            raise ValueError(
                f"segment_size={self.sizes.segment_size}: --task {self.task} needs at least "
                f"{self.sizes.segment_size - self.room + least} tokens"
            )
        # the first segment has nothing earlier to recall
        first = 1 if self.task == "denoise" else 2
        most = math.inf if self.sizes.max_n_segments == -1 else self.sizes.max_n_segments
        plan = DocumentPlan([], [], [], 0, 0)
        for index, length in enumerate(map(sum, rows["section_lengths"])):
            whole = -(-length // self.room)
            n_read = int(min(whole, most))
            plan.n_targets += max(0, whole - first + 1)
            plan.n_unread_targets += max(0, whole - max(n_read, first - 1))
            if n_read < first:
                plan.n_left_out += 1
                continue
            plan.indices.append(index)
            plan.n_segments.append(n_read)
            plan.n_least.append(first)
            plan.n_cut += whole > n_read
            if self.task == "denoise":
                last = length - (n_read - 1) * self.room if n_read == whole else self.room
                plan.n_cut_targets += (n_read - 1) * (self.room > self.target_room) + (last > self.target_room)
        return plan


def infill(ids: list[int], mask_token_id: int, draw: random.Random) -> list[int]:
    """Return the tokens with spans of about 30 % of them removed, each span replaced by one mask token.

    Span lengths are drawn from a Poisson distribution with mean 3. A span of length 0 inserts a mask, unless the result
    could then be longer than `ids`.
    """
    n_left = round(MASKED_SHARE * len(ids))
    n_kept, spans = len(ids) - n_left, list[int]()
    # masks stand at distinct places, so there are at most `n_kept + 1` spans
    while n_left > 0:
        span = n_left if len(spans) == n_kept else min(n_left, poisson(MEAN_SPAN, draw))
        if span or len(spans) < sum(spans):
            spans.append(span)
            n_left -= span
    places = sorted(draw.sample(range(n_kept + 1), len(spans)))
    found, begin, n_removed = list[int](), 0, 0
    for place, span in zip(places, spans, strict=True):
        end = place + n_removed
        found += [*ids[begin:end], mask_token_id]
        begin, n_removed = end + span, n_removed + span
    return found + ids[begin:]


def poisson(mean: float, draw: random.Random) -> int:
    """Draw from a Poisson distribution (Knuth's method: count uniform factors until their product is small)."""
    count, product, least = 0, draw.random(), math.exp(-mean)
    while product > least:
        count += 1
        product *= draw.random()
    return count
