"""Batches of tokenised documents, in an order that depends only on the seed and the step.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.data.rows import TASKS
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.recurrence.segmentation import pad_segments, split_into_segments, to_device


@dataclass(frozen=True)
class SegmentSizes:
    """Segmentation settings, named as in RecurrentBartConfig.

    Training and evaluation may use different values of `max_n_segments`.
    """

    segment_size: int
    input_size: int
    max_n_segments: int


@dataclass
class Batch:
    """Input of one forward pass.

    Attributes:
        input_ids: `(B, N, L)`.
        attention_mask: `(B, N, L)`, 1 at tokens, 0 at padding.
        labels: `(B, T)` for the document task, `(B, N, T)` for the section task; -100 at ignored positions.
        indices: Row of each document in the corpus.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: list[int]

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of the model's forward.

        Only `input_ids` moves to the device. The mask and labels stay on the CPU, because the model branches on their
        values and must not wait for a copy from the GPU.
        """
        ids = to_device(self.input_ids, device)
        return {"input_ids": ids, "attention_mask": self.attention_mask, "labels": self.labels}

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned CPU memory, for asynchronous copies to a GPU; the DataLoader calls this method."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("input_ids", "attention_mask", "labels")}
        return replace(self, **tensors)

    def n_targets(self) -> int:
        """Return the number of target tokens."""
        return int((self.labels != IGNORED).sum())

    def n_tokens(self) -> int:
        """Return the number of document tokens; special tokens count, padding does not."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Collator:
    """Callable that cuts documents into segments and pads the segments to one shape.

    For task `"document"`, a document has one target. For `"sections"`, each section's target is at its last segment.
    `leading` and `trailing` are ids of special tokens around each segment; `around_targets` holds the ids around each
    target (None: the same). `max_target_length` is in tokens, special tokens included.
    """

    task: str
    sizes: SegmentSizes
    leading: list[int]
    trailing: list[int]
    pad_token_id: int
    max_target_length: int
    around_targets: tuple[list[int], list[int]] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: allowed are {', '.join(map(repr, TASKS))}")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate rows of `load_corpus`, each with its `index` in the corpus.

        The field `max_n_segments` of a row, if present, replaces the value of `sizes`; a curriculum sets it.
        """
        documents = [self._named_segments(row) for row in rows]
        labels: list[Any] = [targets for _, targets in documents]
        if self.task == "document":
            labels = [[targets[-1] for targets in labels]]
        input_ids = pad_segments([segments for segments, _ in documents], padding=-1)
        targets = pad_segments(labels, padding=IGNORED)
        is_padding = input_ids < 0
        return Batch(
            input_ids=input_ids.masked_fill(is_padding, self.pad_token_id),
            attention_mask=(~is_padding).long(),
            labels=targets.squeeze(0) if self.task == "document" else targets,
            indices=[row["index"] for row in rows],
        )

    def _named_segments(self, row: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        try:
            return self.segments(row)
        # A damaged cache can raise any exception.
        except Exception as error:
            raise ValueError(f"document {row.get('id')!r}: {error}") from error

    def segments(self, row: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Return a document's segments with their targets. `[]` is the target of a segment without one.

        The ids of the row's `query`, if there are any, stand before the text of each segment. The document is cut after
        `max_n_segments`. A section that is cut in the middle keeps its target.
        """
        segments: list[list[int]] = []
        targets: list[list[int]] = []
        cap = row.get("max_n_segments", self.sizes.max_n_segments)
        leading = [*self.leading, *row.get("query", [])]
        for section, summary in zip(row["sections"], row["summaries"], strict=True):
            if not section or len(segments) == cap:
                continue
            pieces = split_into_segments(
                [*leading, *section, *self.trailing],
                self.sizes.segment_size,
                self.sizes.input_size,
                len(leading),
                len(self.trailing),
            )
            if cap != -1:
                pieces = pieces[: cap - len(segments)]
            segments += pieces
            targets += [[]] * (len(pieces) - 1) + [self.target(summary)]
        return segments, targets

    def plan(self, rows: Mapping[str, Any]) -> "DocumentPlan":
        """Plan the documents of `load_corpus`, given by column; see `plan_documents`."""
        leading, trailing = self.around_targets or (self.leading, self.trailing)
        return plan_documents(
            rows["section_lengths"],
            rows["summary_lengths"],
            self.sizes,
            len(self.leading) + len(self.trailing),
            self.max_target_length,
            len(leading) + len(trailing),
            [len(query) for query in rows["query"]],
        )

    def target(self, summary: list[int]) -> list[int]:
        """Return the target's tokens between the special tokens, as in BART's pretraining."""
        if not summary:
            return []
        leading, trailing = self.around_targets or (self.leading, self.trailing)
        room = self.max_target_length - len(leading) - len(trailing)
        return [*leading, *summary[:room], *trailing]


@dataclass
class DocumentPlan:
    """Documents to read and their numbers of segments, computed from token counts alone.

    Attributes:
        indices: Documents with a target in their first `max_n_segments` segments.
        n_segments: Number of segments that are read, for each document of `indices`.
        n_least: Minimum number of segments that still contains a target, for each document of `indices`.
        n_cut: Number of documents in `indices` that are cut after `max_n_segments` segments.
        n_left_out: Number of documents without a target in their first `max_n_segments` segments.
        n_targets: Number of targets in the whole documents.
        n_unread_targets: Number of targets in the parts of documents that are not read.
        n_cut_targets: Number of read targets that exceed the maximum target length.
    """

    indices: list[int]
    n_segments: list[int]
    n_least: list[int]
    n_cut: int
    n_left_out: int
    n_targets: int = 0
    n_unread_targets: int = 0
    n_cut_targets: int = 0


def plan_documents(
    section_lengths: Sequence[list[int]],
    summary_lengths: Sequence[list[int]],
    sizes: SegmentSizes,
    n_special: int,
    max_target_length: int | None = None,
    n_special_of_target: int | None = None,
    query_lengths: Sequence[int] | None = None,
) -> DocumentPlan:
    """Count the segments and targets of each document without building them.

    Lengths are in tokens without special tokens: `n_special` of each segment, and `n_special_of_target` of each target
    (None: as many). A summary length of 0 marks a section without a target. `query_lengths` are the tokens of each
    document's question and separator, which each segment repeats (None: no questions); see `check_query`.

    Raises:
        ValueError: The special tokens fill the whole segment.
    """
    room = sizes.segment_size - n_special
    if room < 1:
        raise ValueError(
            f"segment_size={sizes.segment_size} must be more than {n_special}, the number of special tokens"
        )
    n_special_of_target = n_special if n_special_of_target is None else n_special_of_target
    target_room = math.inf if max_target_length is None else max_target_length - n_special_of_target
    plan = DocumentPlan([], [], [], 0, 0)
    queries = [0] * len(section_lengths) if query_lengths is None else query_lengths
    for index, (sections, summaries, n_query) in enumerate(zip(section_lengths, summary_lengths, queries, strict=True)):
        counts = [-(-length // (room - n_query)) for length in sections]
        total = sum(counts)
        cap = total if sizes.max_n_segments == -1 else sizes.max_n_segments
        befores = itertools.accumulate(counts[:-1], initial=0)
        targets = [both for both in zip(befores, counts, summaries, strict=True) if both[1] and both[2]]
        with_target = [before for before, _, _ in targets]
        plan.n_targets += len(targets)
        plan.n_unread_targets += sum(before >= cap for before in with_target)
        plan.n_cut_targets += sum(before < cap and length > target_room for before, _, length in targets)
        if not with_target or with_target[0] >= cap:
            plan.n_left_out += 1
            continue
        plan.indices.append(index)
        plan.n_segments.append(min(total, cap))
        # A section that is cut in the middle keeps its target.
        plan.n_least.append(with_target[0] + 1)
        plan.n_cut += total > cap
    return plan


def check_query(n_tokens: int, room: int, segment_size: int, name: str) -> None:
    """Raise ValueError if a question of `n_tokens` tokens leaves no room for a text in segments with `room` tokens."""
    if n_tokens >= room:
        raise ValueError(
            f"{name}: the query has {n_tokens} tokens with its separator, which leave no room for text in segments of "
            f"{segment_size} tokens (--segment_size); shorten the query"
        )


class DocumentOrder(ABC):
    """Sequence in which documents are read. The sequence has no end, and each epoch has a new order.

    Args:
        n_segments: Number of segments of each document.
        seed: Seed of the order.
        first_step: Step whose position in the order is known.
        first_document: Number of documents read before `first_step`.
    """

    def __init__(self, n_segments: Sequence[int], seed: int, first_step: int = 0, first_document: int = 0):
        self.n_segments, self.seed = torch.tensor(n_segments), seed
        self.first_step, self.first_document = first_step, first_document

    @abstractmethod
    def documents_before(self, step: int) -> int:
        """Return the number of documents read before `step`; steps count from 0."""

    @abstractmethod
    def steps_to_read(self, n_documents: int) -> int:
        """Return the first step before which at least `n_documents` documents are read; at least `first_step`."""

    @abstractmethod
    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Return the document indices of optimizer step `step`, grouped by micro-batch, then by rank.

        In each micro-step, all ranks get documents of similar length, so that no rank waits long for another rank.
        """

    def epoch(self, step: int) -> float:
        """Return the number of epochs completed after `step` optimizer steps, as a fraction."""
        return self.documents_before(step) / len(self.n_segments)

    def padding(self, n_steps: int, world_size: int, accumulation: int) -> float:
        """Return the share of padding segments (0 to 1) in the `n_steps` steps from `first_step` on."""
        steps = range(self.first_step, self.first_step + n_steps)
        parts = itertools.chain.from_iterable(self.micro_batches(step, world_size, accumulation) for step in steps)
        batches = [self.n_segments[documents] for part in parts for documents in part]
        n_computed = sum(int(lengths.max()) * len(lengths) for lengths in batches)
        return 1 - sum(int(lengths.sum()) for lengths in batches) / n_computed

    def permutation(self, n: int, purpose: str, number: int) -> Tensor:
        """Return a permutation of `range(n)` that depends only on the seed, `purpose` and `number`."""
        # Each call has its own generator, so no draw depends on the number of draws before it. The generator uses only
        # 32 bits of its seed, so the key is hashed to 32 bits.
        digest = hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()
        return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4])))


class BatchOrder(DocumentOrder):
    """Document order with a fixed number of documents per optimizer step.

    An epoch reads each document once before the next epoch begins. The documents of `pool` batches are sorted by number
    of segments, which reduces padding. Then the batches are shuffled. The sequence depends only on the seed and `unit`.
    A resumed run with another `global_batch` continues the sequence: the run repeats no document and skips none.

    Args (see also `DocumentOrder`):
        global_batch: Documents of one optimizer step, over all ranks and accumulation steps.
        pool: Maximum number of batches that are sorted together.
        unit: Documents of one batch of the sequence; default: `global_batch`.
    """

    def __init__(
        self,
        n_segments: Sequence[int],
        global_batch: int,
        seed: int,
        pool: int = 16,
        unit: int | None = None,
        first_step: int = 0,
        first_document: int = 0,
    ):
        super().__init__(n_segments, seed, first_step, first_document)
        self.global_batch, self.unit = global_batch, unit or global_batch
        self.pool = max(1, min(pool, len(n_segments) // self.unit))
        # documents of the last epochs, by number of the epoch
        self._cached: dict[int, Tensor] = {}

    def documents_before(self, step: int) -> int:
        """Return the number of documents in all earlier steps."""
        return self.first_document + (step - self.first_step) * self.global_batch

    def steps_to_read(self, n_documents: int) -> int:
        """Return the number of steps that read `n_documents` documents, the last step in full."""
        return self.first_step + max(0, -(-(n_documents - self.first_document) // self.global_batch))

    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Split the sorted documents into equal micro-batches. Distribute each micro-batch over the ranks in turn."""
        documents = self.step_indices(step)
        size = len(documents) // accumulation
        parts = [documents[micro * size : (micro + 1) * size] for micro in range(accumulation)]
        return [[part[rank::world_size] for rank in range(world_size)] for part in parts]

    def step_indices(self, step: int) -> list[int]:
        """Return the documents of optimizer step `step` by increasing number of segments; steps count from 0."""
        first = self.documents_before(step)
        last, n_documents = first + self.global_batch, len(self.n_segments)
        parts = [
            self._epoch(number)[max(0, first - number * n_documents) : last - number * n_documents]
            for number in range(first // n_documents, (last - 1) // n_documents + 1)
        ]
        documents = torch.cat(parts)
        return documents[self.n_segments[documents].argsort(stable=True)].tolist()

    def _epoch(self, number: int) -> Tensor:
        """Return all documents in the order in which an epoch reads them."""
        if number not in self._cached:
            # a step may read from two epochs
            self._cached = {key: value for key, value in self._cached.items() if key == number - 1}
            self._cached[number] = self._draw_epoch(number)
        return self._cached[number]

    def _draw_epoch(self, number: int) -> Tensor:
        drawn = self.permutation(len(self.n_segments), "round", number)
        # the documents before and after the whole batches share a batch with another epoch
        n_before = min(-number * len(drawn) % self.unit, len(drawn))
        n_whole = (len(drawn) - n_before) // self.unit * self.unit
        pools = drawn[n_before : n_before + n_whole].split(self.pool * self.unit)
        keys = (number * len(pools) + place for place in range(len(pools)))
        batches = [self._shuffled(pool, key) for pool, key in zip(pools, keys, strict=True) if len(pool)]
        return torch.cat([drawn[:n_before], *batches, drawn[n_before + n_whole :]])

    def _shuffled(self, pool: Tensor, key: int) -> Tensor:
        """Sort the documents of whole batches by length, and shuffle the batches."""
        by_length = pool[self.n_segments[pool].argsort(stable=True)].view(-1, self.unit)
        return by_length[self.permutation(len(by_length), "pool", key)].flatten()


class RankBatches:
    """Endless batch sampler of one rank: the document indices of each micro-batch from `first_step` on."""

    def __init__(self, order: DocumentOrder, first_step: int, rank: int, world_size: int, accumulation: int):
        self.order, self.first_step, self.accumulation = order, first_step, accumulation
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.first_step):
            for parts in self.order.micro_batches(step, self.world_size, self.accumulation):
                yield parts[self.rank]
