"""From tokenised documents to batches, in an order that follows from the seed and the step alone.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.data.rows import TASKS
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.recurrence.segmentation import pad_segments, split_into_segments, to_device


@dataclass(frozen=True)
class SegmentSizes:
    """How documents are cut, with names and meanings of RecurrentBartConfig.

    `max_n_segments` is the cap for these documents, which in evaluation may be another than in training.
    """

    segment_size: int
    input_size: int
    max_n_segments: int


@dataclass
class Batch:
    """Documents for one forward pass.

    Attributes:
        input_ids: `(B, N, L)`.
        attention_mask: `(B, N, L)`, 1 at tokens.
        labels: `(B, T)` for the document task, `(B, N, T)` for sections; -100 where there is no target.
        indices: Which documents of the corpus these are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: list[int]

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the model's forward; what it decides by stays on the host, so that it waits for no device."""
        ids = to_device(self.input_ids, device)
        return {"input_ids": ids, "attention_mask": self.attention_mask, "labels": self.labels}

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU copies from while the processor goes on; DataLoader calls it."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("input_ids", "attention_mask", "labels")}
        return replace(self, **tensors)

    def n_targets(self) -> int:
        """Number of target tokens."""
        return int((self.labels != IGNORED).sum())

    def n_tokens(self) -> int:
        """Number of document tokens, special tokens included, padding not."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Collator:
    """Cuts documents into segments and pads them to one shape.

    Attributes:
        task: `"document"`: one target per document; `"sections"`: a section's target belongs to its last segment.
        sizes: How documents are cut.
        leading: Special tokens in front of each segment and each target.
        trailing: Special tokens behind them.
        pad_token_id: Id at padding.
        max_target_length: Longer targets are cut.
    """

    task: str
    sizes: SegmentSizes
    leading: list[int]
    trailing: list[int]
    pad_token_id: int
    max_target_length: int

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r}: allowed are {', '.join(map(repr, TASKS))}")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Batch of rows of `load_corpus`, each with its `index` in the corpus.

        A row may have a `max_n_segments` of its own, for a curriculum.
        """
        documents = [self._named_segments(row) for row in rows]
        labels: list[Any] = [targets for _, targets in documents]
        if self.task == "document":
            labels = [[targets[-1] for targets in labels]]
        input_ids = torch.tensor(pad_segments([segments for segments, _ in documents], padding=-1))
        targets = torch.tensor(pad_segments(labels, padding=IGNORED))
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
        # what a damaged cache may hold is open
        except Exception as error:
            raise ValueError(f"document {row.get('id')!r}: {error}") from error

    def segments(self, row: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        """One document's segments, and the target of each, empty where it has none.

        A document is cut after `max_n_segments`. The section that the cut goes through keeps its target.
        """
        segments: list[list[int]] = []
        targets: list[list[int]] = []
        cap = row.get("max_n_segments", self.sizes.max_n_segments)
        for section, summary in zip(row["sections"], row["summaries"], strict=True):
            if not section or len(segments) == cap:
                continue
            pieces = split_into_segments(
                [*self.leading, *section, *self.trailing],
                self.sizes.segment_size,
                self.sizes.input_size,
                len(self.leading),
                len(self.trailing),
            )
            if cap != -1:
                pieces = pieces[: cap - len(segments)]
            segments += pieces
            targets += [[]] * (len(pieces) - 1) + [self.target(summary)]
        return segments, targets

    def target(self, summary: list[int]) -> list[int]:
        """Labels of a target: its tokens with the special ones around them, as BART was pretrained."""
        if not summary:
            return []
        room = self.max_target_length - len(self.leading) - len(self.trailing)
        return [*self.leading, *summary[:room], *self.trailing]


@dataclass
class DocumentPlan:
    """What of a corpus is read, known from lengths alone.

    Attributes:
        indices: Documents that have a target in the part that is read.
        n_segments: Number of segments of each of them.
        n_least: Likewise, up to where it has its first target; cut before that, it would have none.
        n_cut: How many of them are longer than is read.
        n_left_out: Documents without a target in the part that is read.
        n_targets: Targets of all documents, in any part of them.
        n_unread_targets: Targets behind the part that is read.
        n_cut_targets: Targets that are read, and are longer than a target may be.
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
) -> DocumentPlan:
    """Count the segments and targets of each document, without making any.

    Args:
        section_lengths: Tokens of each section of each document, special ones not counted.
        summary_lengths: Likewise of each section's target; 0 where there is none.
        sizes: How documents are cut.
        n_special: Special tokens of a segment, and of a target.
        max_target_length: Tokens after which a target is cut; None: it is not.

    Raises:
        ValueError: A segment has no room for text.
    """
    room = sizes.segment_size - n_special
    if room < 1:
        raise ValueError(f"segment_size={sizes.segment_size} leaves no room beside {n_special} special tokens")
    target_room = math.inf if max_target_length is None else max_target_length - n_special
    plan = DocumentPlan([], [], [], 0, 0)
    for index, (sections, summaries) in enumerate(zip(section_lengths, summary_lengths, strict=True)):
        counts = [-(-length // room) for length in sections]
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
        # a section that a cut goes through keeps its target
        plan.n_least.append(with_target[0] + 1)
        plan.n_cut += total > cap
    return plan


class DocumentOrder(ABC):
    """Which documents each step reads: all of them in a new order every time round, without end.

    Args:
        n_segments: Number of segments of each document.
        seed: Of the order.
        first_step: A step whose place in the order is known.
        first_document: Documents read before it.
    """

    def __init__(self, n_segments: Sequence[int], seed: int, first_step: int = 0, first_document: int = 0):
        self.n_segments, self.seed = torch.tensor(n_segments), seed
        self.first_step, self.first_document = first_step, first_document

    @abstractmethod
    def documents_before(self, step: int) -> int:
        """How many documents are read before a step, counted from 0."""

    @abstractmethod
    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Documents of an optimizer step, counted from 0: of each micro-batch, those of each process.

        Neighbours in length go to the same micro-batch of different processes, so that no process waits long.
        """

    def epoch(self, step: int) -> float:
        """How many times every document has been read after `step` optimizer steps."""
        return self.documents_before(step) / len(self.n_segments)

    def padding(self, n_steps: int, world_size: int, accumulation: int) -> float:
        """Share of the segments of some steps, from the first known one on, that hold no text."""
        steps = range(self.first_step, self.first_step + n_steps)
        parts = itertools.chain.from_iterable(self.micro_batches(step, world_size, accumulation) for step in steps)
        batches = [self.n_segments[documents] for part in parts for documents in part]
        n_computed = sum(int(lengths.max()) * len(lengths) for lengths in batches)
        return 1 - sum(int(lengths.sum()) for lengths in batches) / n_computed

    def permutation(self, n: int, purpose: str, number: int) -> Tensor:
        """Numbers below `n` in an order that nothing but the seed and the two names of the draw decide."""
        # a generator of its own for each use: no draw depends on how many came before. It reads 32 bits of its seed
        # and no more, so all that it must differ by is hashed into those
        digest = hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()
        return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4])))


class BatchOrder(DocumentOrder):
    """Batches of ever the same number of documents.

    Of every `pool` batches the documents are sorted by their number of segments, so that a batch has little padding,
    and the batches are shuffled. This sequence of documents depends on the seed and the size of its batches alone.
    Steps take from it as many as they need, so a run that goes on with steps of another size repeats and leaves out
    none.

    Args:
        n_segments: Number of segments of each document.
        global_batch: Documents of one optimizer step, over all processes and accumulation steps.
        seed: Of the order.
        pool: Number of batches sorted together, at most.
        unit: Documents of one batch of the sequence; `global_batch` if not given.
        first_step: A step whose place in the sequence is known.
        first_document: Documents read before it.
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
        # no larger than a round, or a document would often stand beside itself
        self.pool = max(1, min(pool, len(n_segments) // self.unit))

    def documents_before(self, step: int) -> int:
        """As many as all steps before have."""
        return self.first_document + (step - self.first_step) * self.global_batch

    def micro_batches(self, step: int, world_size: int, accumulation: int) -> list[list[list[int]]]:
        """Parts of one size, in order of length; every process has its turn in each."""
        documents = self.step_indices(step)
        size = len(documents) // accumulation
        parts = [documents[micro * size : (micro + 1) * size] for micro in range(accumulation)]
        return [[part[rank::world_size] for rank in range(world_size)] for part in parts]

    def step_indices(self, step: int) -> list[int]:
        """Documents of an optimizer step, counted from 0, those with the fewest segments first."""
        first = self.documents_before(step)
        last = first + self.global_batch
        units = [self._unit(number) for number in range(first // self.unit, -(-last // self.unit))]
        offset = first % self.unit
        documents = torch.cat(units)[offset : offset + self.global_batch]
        return documents[self.n_segments[documents].argsort(stable=True)].tolist()

    def _unit(self, number: int) -> Tensor:
        """A batch of the sequence."""
        pool_index, place = divmod(number, self.pool)
        size = self.pool * self.unit
        documents = self._documents(pool_index * size, size)
        by_length = documents[self.n_segments[documents].argsort(stable=True)]
        return by_length.view(self.pool, self.unit)[self.permutation(self.pool, "pool", pool_index)[place]]

    def _documents(self, first: int, count: int) -> Tensor:
        """Places `first` to `first + count` of the endless rounds through the documents."""
        n_documents = len(self.n_segments)
        first_round, last_round = first // n_documents, (first + count - 1) // n_documents
        rounds = [self.permutation(n_documents, "round", number) for number in range(first_round, last_round + 1)]
        offset = first - first_round * n_documents
        return torch.cat(rounds)[offset : offset + count]


class RankBatches:
    """The micro-batches of one process from a step on, without end, as lists of document indices.

    Args:
        order: The order of all documents.
        first_step: Optimizer step to begin with.
        rank: This process.
        world_size: Number of processes.
        accumulation: Micro-batches of a process in one optimizer step.
    """

    def __init__(self, order: DocumentOrder, first_step: int, rank: int, world_size: int, accumulation: int):
        self.order, self.first_step, self.accumulation = order, first_step, accumulation
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.first_step):
            for parts in self.order.micro_batches(step, self.world_size, self.accumulation):
                yield parts[self.rank]
