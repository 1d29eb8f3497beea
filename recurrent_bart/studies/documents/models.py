"""Models of studies on documents, and the part of a batch that each model reads.

Shape suffixes: B documents, N segments, M segments that have a target, L tokens in a segment, T target length,
V vocabulary.
"""

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch, Collator, SegmentSizes
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.probes.foreign_states import encode_with_foreign_states
from recurrent_bart.recurrence.attention import without_cudnn
from recurrent_bart.studies.documents.led import WholeDocumentLed
from recurrent_bart.studies.documents.peers import NumberedSegments, read_at_once
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.model_building import build_model

# maximum length of a section's head (its first tokens), in segments
HEAD = 2


class HeadCollator(Collator):
    """Collator that makes one segment of each section with a target; the segment holds the section's start."""

    def segments(self, row: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Return one segment per section start, and the targets. Collator returns the same targets."""
        _, targets = super().segments(row)
        leading = [*self.leading, *row.get("query", [])]
        room = HEAD * self.sizes.segment_size - len(leading) - len(self.trailing)
        parts = zip(row["sections"], row["summaries"], strict=True)
        heads = [[*leading, *section[:room], *self.trailing] for section, summary in parts if section and summary]
        targets = [target for target in targets if target]
        return heads[: len(targets)], targets


def collate_as(reads: str, collator: Collator) -> Collator:
    """Return the collator for a value of `TextRun.reads`. `collator` cuts documents into segments.

    Raises:
        ValueError: `"whole"` needs a maximum document length, which the collator lacks.
    """
    if reads == "segments":
        return collator
    if reads == "heads":
        return HeadCollator(**vars(collator))
    n_tokens = collator.sizes.segment_size * collator.sizes.max_n_segments
    if n_tokens < 0:
        raise ValueError("--max_n_segments -1: LED needs a maximum document length; give a number of segments")
    return replace(collator, sizes=SegmentSizes(n_tokens, n_tokens, 1))


def without_memory(batch: Batch) -> Batch:
    """Return a batch with one document per segment that has a target. A model without state reads no other segment."""
    is_read_BN = batch.attention_mask.bool().any(dim=-1)
    is_last_BN = is_read_BN & (is_read_BN.cumsum(dim=1) == is_read_BN.sum(dim=1, keepdim=True))
    has_target_BN = (batch.labels != IGNORED).any(dim=-1) if batch.labels.dim() == 3 else is_last_BN
    mask_ML = batch.attention_mask[has_target_BN]
    longest = int(mask_ML.sum(dim=-1).max())
    return replace(
        batch,
        input_ids=batch.input_ids[has_target_BN][:, None, :longest],
        attention_mask=mask_ML[:, None, :longest],
        labels=batch.labels[has_target_BN] if batch.labels.dim() == 3 else batch.labels,
    )


def build_reader(run: TextRun, arguments: Arguments, config: RecurrentBartConfig, sizes: SegmentSizes) -> nn.Module:
    """Build the model for batches of the collator from `collate_as`. It has the run's seed and is in training mode."""
    seed, n_tokens = arguments.run.seed, sizes.segment_size * sizes.max_n_segments
    if run.reads == "heads":
        config = copy.deepcopy(config)
        config.segment_size = config.input_size = HEAD * sizes.segment_size
        config.max_position_embeddings = max(config.max_position_embeddings, config.segment_size)
    if run.model == "led" and arguments.model.model_name_or_path is None:
        torch.manual_seed(seed)
        return WholeDocumentLed(config, n_tokens, HEAD * sizes.segment_size).train()
    model = build_model(arguments.model, config, seed)
    if run.model == "led":
        led = WholeDocumentLed(config, n_tokens, HEAD * sizes.segment_size)
        led.copy_weights(model)
        return led.train()
    if run.model == "numbered":
        return NumberedSegments(model, sizes.max_n_segments).train()
    return read_at_once(model, n_tokens) if run.reads == "whole" else model


@dataclass(frozen=True)
class Reader:
    """Model of a study, with its device.

    Attributes:
        model: Module that returns a loss or logits for a batch.
        has_memory: The model needs the segments before the segment that has a target.
        device: Device of the model.
        may_plan: cuDNN may plan attention for each new shape.
    """

    model: Any
    has_memory: bool
    device: torch.device
    may_plan: bool = True

    def needed(self, batch: Batch) -> Batch:
        """Return the part of the batch that the model reads."""
        return batch if self.has_memory else without_memory(batch)

    def loss(self, batch: Batch, n_targets: float) -> Tensor:
        """Return the loss of a batch that `needed` returned: the sum over target tokens, divided by `n_targets`."""
        inputs = batch.model_inputs(self.device)
        with self._attention():
            return self.model(**inputs, num_items_in_batch=n_targets, return_logits=False).loss

    @torch.no_grad()
    def target_losses(self, batch: Batch) -> Tensor:
        """Return the loss of each target, summed over its tokens, `(M,)`."""
        batch = self.needed(batch)
        with self._attention():
            return self._sum_losses(batch, self.model(**batch.model_inputs(self.device)).logits)

    @torch.no_grad()
    def losses_with_foreign_states(self, batch: Batch) -> Tensor:
        """Return the loss of each target if every segment reads the state of a different document, `(B,)`."""
        inputs = batch.model_inputs(self.device)
        encoded = encode_with_foreign_states(self.model, inputs["input_ids"], inputs["attention_mask"])
        return self._sum_losses(batch, self.model(encoder_outputs=encoded, labels=inputs["labels"]).logits)

    def _sum_losses(self, batch: Batch, logits: Tensor) -> Tensor:
        has_target = (batch.labels != IGNORED).any(dim=-1)
        logits_MVT = logits[has_target.to(self.device)].float().mT
        labels_MT = batch.labels[has_target].to(self.device)
        return nn.functional.cross_entropy(logits_MVT, labels_MT, ignore_index=IGNORED, reduction="none").sum(dim=-1)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        # without a state, tensor shapes change in every step
        return contextlib.nullcontext() if self.may_plan else without_cudnn()
