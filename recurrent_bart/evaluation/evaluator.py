"""Validation loss and generated texts of a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_bart.data.batches import Batch, Collator, DocumentPlan
from recurrent_bart.data.held_out import Node, RelatedRows
from recurrent_bart.data.text_encoder import decode_text
from recurrent_bart.distributed import gather_objects, rank, sum_over_ranks, world_size
from recurrent_bart.evaluation.predictions import unique_names
from recurrent_bart.model.decoding.session_store import drop_sessions
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

# Number of source tokens shown in a sample.
HEAD = 100


@dataclass(frozen=True)
class Sample:
    """Generated text and its target; `source` is the question, if there is one, and the beginning of the source text.

    Attributes:
        id: Unique name of the document. For the section task, the section's index in the record follows in brackets.
        document: Index of the corpus row.
        section: Index of the section in the corpus row.
    """

    id: str
    source: str
    target: str
    generated: str
    document: int
    section: int = 0


@dataclass(frozen=True)
class Generation:
    """Generation settings. `num_beams=None`: the model's value; `n_documents=-1`: summarise all documents."""

    max_new_tokens: int
    num_beams: int | None = None
    n_documents: int = -1


@dataclass
class Evaluator:
    """Evaluation of a model on the documents of `plan`, which are distributed over the ranks.

    `batch_size` is the number of documents of a forward pass on one rank. `on_batch` is called before each batch,
    equally often on every rank. An exception from `on_batch` ends the evaluation.
    """

    corpus: Dataset
    plan: DocumentPlan
    collator: Collator
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    device: torch.device
    on_batch: Callable[[], None] = lambda: None

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        """Return the cross-entropy per target token over all documents of all ranks.

        The model must be in evaluation mode and not sharded, because ranks run different numbers of forward passes.
        """
        total, n_targets = 0.0, 0.0
        for batch in self._batches(self.plan.indices):
            output = model(**batch.model_inputs(self.device), num_items_in_batch=1, return_logits=False)
            total += float(output.loss)
            n_targets += batch.n_targets()
        total, n_targets = sum_over_ranks(total, n_targets, device=self.device)
        return total / n_targets

    def target_losses(self, losses: Callable[[Batch], Tensor]) -> dict[int, list[float]]:
        """Return each target's loss (sum over tokens) by document, on every rank. `losses` maps a batch to losses."""
        found: dict[int, list[float]] = {}
        for batch in self._batches(self.plan.indices):
            has_target = (batch.labels != IGNORED).any(dim=-1).view(len(batch.labels), -1)
            parts = losses(batch).cpu().split(has_target.sum(dim=1).tolist())
            found |= {index: part.tolist() for index, part in zip(batch.indices, parts, strict=True)}
        return {index: own for part in gather_objects(found) for index, own in part.items()}

    def summarise(self, model: RecurrentBartForConditionalGeneration, how: Generation) -> list[Sample]:
        """Generate texts for the first documents. Return samples in the same order on every rank."""
        n_documents = len(self.plan.indices) if how.n_documents == -1 else how.n_documents
        samples: list[tuple[int, list[Sample]]] = []
        try:
            for batch in self._batches(self.plan.indices[:n_documents]):
                pairs = zip(batch.indices, self._generate(model, batch, how), strict=True)
                samples += [(index, self._samples(index, ids)) for index, ids in pairs]
        finally:
            # training needs the memory
            drop_sessions(model)
        found = dict(pair for part in gather_objects(samples) for pair in part)
        return [sample for index in sorted(found) for sample in found[index]]

    @cached_property
    def names(self) -> list[str]:
        """Unique names of the corpus rows."""
        return unique_names(list(self.corpus["id"]))

    @cached_property
    def documents(self) -> list[str]:
        """Name of each corpus row's document. Rows with the same record id or the same text are one document."""
        both, related = list(zip(self.corpus["digest"], self.corpus["record_id"], strict=True)), RelatedRows()
        for digest, record_id in both:
            related.add(digest, record_id)
        roots = [related.root(("text", digest)) for digest, _ in both]
        first_name: dict[Node, str] = {}
        for root, name in zip(roots, self.names, strict=True):
            first_name.setdefault(root, root[1] if root[0] == "id" else name)
        return [first_name[root] for root in roots]

    @property
    def n_documents(self) -> int:
        """Number of different documents that are evaluated. Several questions about one text count once."""
        return len({self.documents[index] for index in self.plan.indices})

    def source_text(self, document: int, section: int) -> str:
        """Return the decoded text of a section. A document with one target has one section."""
        return self._decode(self.corpus[document]["sections"][section])

    def query_text(self, document: int) -> str:
        """Return the decoded question of a document; empty without a question."""
        return self._decode(self.corpus[document].get("query", [])).strip()

    def _decode(self, ids: list[int]) -> str:
        return decode_text(self.tokenizer, ids)

    def _generate(self, model: RecurrentBartForConditionalGeneration, batch: Batch, how: Generation) -> list[Tensor]:
        """Return the generated ids of each document, `(tokens,)`, or `(segments, tokens)` for the section task."""
        settings: dict[str, Any] = {} if how.num_beams is None else {"num_beams": how.num_beams}
        if self.collator.task == "sections":
            # Packing pays off because sections differ in length.
            settings |= {"target_segments": (batch.labels != IGNORED).any(dim=-1), "may_pack": True}
        ids = model.generate(
            batch.input_ids.to(self.device),
            attention_mask=batch.attention_mask.to(self.device),
            max_new_tokens=how.max_new_tokens,
            **settings,
        )
        return list(ids.cpu())

    def _samples(self, index: int, generated: Tensor) -> list[Sample]:
        row, name = self.corpus[index], self.names[index]
        if self.collator.task == "document":
            return [self._sample(name, row, index, 0, generated)]
        _, targets = self.collator.segments(row)
        places = [place for place, target in enumerate(targets) if target]
        parts = enumerate(zip(row["sections"], row["summaries"], strict=True))
        with_target = [section for section, (source, summary) in parts if source and summary]
        # Sections after the cut have a text but no generated ids.
        return [
            self._sample(f"{name}[{row['section_indices'][section]}]", row, index, section, generated[place])
            for place, section in zip(places, with_target, strict=False)
        ]

    def _sample(self, name: str, row: dict[str, Any], index: int, section: int, generated: Tensor) -> Sample:
        source, query = row["sections"][section], self.query_text(index)
        head = self._decode(source[:HEAD]) + (" …" if source[HEAD:] else "")
        return Sample(
            id=name,
            source=f"{query}\n{head}" if query else head,
            target=row["summary_texts"][section],
            generated=decode_text(self.tokenizer, generated).strip(),
            document=index,
            section=section,
        )

    def _batches(self, indices: list[int]) -> Iterator[Batch]:
        lengths = dict(zip(self.plan.indices, self.plan.n_segments, strict=True))
        by_length = sorted(indices, key=lambda index: lengths[index])
        groups = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        for first in range(0, len(groups), world_size()):
            self.on_batch()
            # The last round may have fewer batches than ranks.
            for group in groups[first + rank() : first + rank() + 1]:
                yield self.collator([{**self.corpus[index], "index": index} for index in group])
