"""Outputs of the models.

Shape suffixes: B documents, N segments, L tokens in a segment, A attended length, M target segments (a target follows
each), m target segments that are decoded in one call, H heads, T target length, V vocabulary, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import is_traced, to_device
from recurrent_bart.recurrence.segmented_batch import SegmentedBatch, check_one_target, check_targets


def take(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Select elements by index or boolean mask; a mask on the CPU avoids a device synchronization."""
    if chosen.dtype != torch.bool:
        return tensor[chosen]
    if chosen.all():
        return tensor.flatten(0, chosen.dim() - 1)
    return tensor[_indices(chosen, tensor.device)]


def put_back(taken: Tensor, chosen: Tensor) -> Tensor:
    """Undo `take`: return a tensor with `taken` where `chosen` is True and zeros elsewhere."""
    if chosen.all():
        return taken.unflatten(0, chosen.shape)
    whole = taken.new_zeros(*chosen.shape, *taken.shape[1:])
    whole[_indices(chosen, whole.device)] = taken
    return whole


def _context_mask(hidden_BAD: Tensor, attention_mask: Tensor | None, n_memory: int) -> tuple[Tensor, bool | None]:
    """Return the context's padding mask `(B, A)`, and True if it has a 0, None if that is unknown while traced.

    `attention_mask` may leave out the leading state positions.
    """
    whole_BA = torch.ones(hidden_BAD.shape[:2], dtype=torch.long, device=hidden_BAD.device)
    if attention_mask is None or (not is_traced() and attention_mask.all()):
        return whole_BA, False
    if attention_mask.dim() == 2 and attention_mask.shape[1] == hidden_BAD.shape[1] - n_memory:
        attention_mask = nn.functional.pad(attention_mask, (n_memory, 0), value=1)
    if attention_mask.shape != whole_BA.shape:
        raise ValueError(
            f"encoder_outputs: context_mask is missing, and attention_mask of shape {tuple(attention_mask.shape)} does "
            f"not show which of the {hidden_BAD.shape[1]} positions are padding; give the encoder's "
            f"RecurrentEncoderOutput, or attention_mask of shape {tuple(whole_BA.shape)}"
        )
    return attention_mask.to(whole_BA), None if is_traced() else True


def _indices(chosen: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(to_device(index_M, device) for index_M in chosen.nonzero(as_tuple=True))


@dataclass(frozen=True)
class Packing:
    """Layout of packed contexts: groups of contexts of similar length, concatenated.

    Attributes:
        sizes: Per group, the number of contexts and the length that they are padded to.
        order: `(M,)`, index of each packed context in the unpacked order; on the CPU.
    """

    sizes: list[tuple[int, int]]
    order: Tensor

    def unpack(self, packed: Tensor, dim: int) -> list[Tensor]:
        """Split dimension `dim` by group; return one tensor `(..., m, A, ...)` per group."""
        parts = packed.split([n_rows * n_positions for n_rows, n_positions in self.sizes], dim)
        return [part.unflatten(dim, size) for part, size in zip(parts, self.sizes, strict=True)]


@dataclass
class RecurrentEncoderOutput(BaseModelOutput):
    """Encoder output: the context that the decoder attends to, and the state after the last segment.

    Attributes:
        last_hidden_state: Context `(B, A, D)`: states, then tokens, chosen by `config.decoder_context`. With
            `decode_at="every_segment"` `(B, N, A, D)`. After target segments: rows `(M, A, D)`, document by document,
            or packed `(1, A, D)`.
        hidden_states: Token hidden states before the first layer and after every layer, each `(B, N, L, D)`.
        attentions: Attention weights of tokens in every layer, each `(B, N, H, L, A)`, prefix first. With
            `pre_seq_len=0` and flat documents of one segment, `hidden_states` and `attentions` have BART's shapes,
            without N.
        context_mask: Padding mask of the context, `(B, A)` or `(B, N, A)`, 1 at positions to attend to.
        is_read: `(B, N)` booleans, False where a document has fewer segments.
        n_memory: Number of leading positions of `last_hidden_state` that are state.
        has_padding: True if `context_mask` has a 0, known without a device synchronization; None: unknown.
        state: State after the last segment.
        packing: Layout of packed contexts; None: not packed.
        target_segments: `(B, N)` booleans on the CPU, True at segments with a context; None: the context is the one
            after each document's last segment.
        host_mask: Booleans of the shape of `context_mask` on the CPU; None: unknown, or without padding. If you change
            `context_mask`, set it to None.
    """

    context_mask: Tensor | None = None
    is_read: Tensor | None = None
    n_memory: int | None = None
    has_padding: bool | None = None
    state: RecurrentState | None = None
    packing: Packing | None = None
    target_segments: Tensor | None = None
    host_mask: Tensor | None = None

    def as_tuple(self) -> tuple:
        """Return all fields as nested plain tuples, because hooks on modules find tensors only in tuples."""
        state = self.state and tuple(getattr(self.state, item.name) for item in fields(RecurrentState))
        plain = self.last_hidden_state, self.hidden_states, self.attentions, self.context_mask, self.is_read
        packing = self.packing and tuple(getattr(self.packing, item.name) for item in fields(Packing))
        return *plain, self.n_memory, self.has_padding, state, packing, self.target_segments, self.host_mask

    @classmethod
    def from_tuple(cls, values: Sequence) -> "RecurrentEncoderOutput":
        """Build the output from the result of `as_tuple`."""
        *plain, state, packing, targets, host_mask = values
        return cls(*plain, state and RecurrentState(*state), packing and Packing(*packing), targets, host_mask)

    @classmethod
    def of(
        cls,
        given: "RecurrentEncoderOutput | BaseModelOutput | Sequence",
        config: RecurrentBartConfig,
        attention_mask: Tensor | None = None,
    ) -> "RecurrentEncoderOutput":
        """Convert encoder outputs to this class, from BART's object or tuple or from the result of `as_tuple`.

        `attention_mask` is the padding mask `(B, A)` of BART's outputs, or of the positions after the state. Raise
        ValueError if the decoder needs a field that is missing.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, BaseModelOutput):
            given = given.last_hidden_state, given.hidden_states, given.attentions
        if len(given) == len(fields(cls)):
            return cls.from_tuple(given)
        if not 1 <= len(given) <= 3:
            raise ValueError(
                f"encoder_outputs: a tuple of {len(given)} values; give a RecurrentEncoderOutput, its plain tuple of "
                f"{len(fields(cls))}, or (last_hidden_state, hidden_states, attentions)"
            )
        hidden = given[0]
        if config.decoder_context == "memory" and config.prefix_attention == "gated":
            raise ValueError(
                'encoder_outputs: n_memory is missing. With decoder_context="memory" and prefix_attention="gated" the '
                "decoder must know how many positions are states; give the RecurrentEncoderOutput of the encoder"
            )
        n_memory = config.pre_seq_len if config.has_state and config.decoder_context != "memory" else 0
        mask, has_padding = _context_mask(hidden, attention_mask, n_memory)
        return cls(*given, context_mask=mask, n_memory=n_memory, has_padding=has_padding)

    def check_one_context(self) -> None:
        """Raise a ValueError unless there is one context per document."""
        if self.last_hidden_state.dim() != 3 or self.packing is not None:
            raise ValueError(
                f"encoder_outputs of shape {tuple(self.last_hidden_state.shape)} hold several contexts per row; "
                "give one context per row (B, A, D), or call generate(decode_at=..., target_segments=...)"
            )
        check_one_target(self.target_segments)

    def check_given(self, decode_at: str, target_segments_BN: Tensor | None, config: RecurrentBartConfig) -> None:
        """Check outputs that a caller gives a forward pass; raise ValueError if it would decode from other segments."""
        if target_segments_BN is not None or decode_at != "last_segment":
            self.check_contexts(decode_at, target_segments_BN, config)
        if self.target_segments is not None and self.is_read is not None:
            check_targets(self.target_segments.cpu(), self.is_read.cpu())

    def check_contexts(
        self, decode_at: str, target_segments_BN: Tensor | None, config: RecurrentBartConfig
    ) -> Tensor | None:
        """Return the segments after which to decode, `(B, N)`; None: after the last segment of each document.

        Raises:
            ValueError: The contexts were computed for other segments. With `decoder_context="section"` the targets also
                decide where a section begins.
        """
        held_BN = None if self.target_segments is None else self.target_segments.cpu()
        if target_segments_BN is None and decode_at == "last_segment":
            self._check_same(held_BN is None, "the last segment of each document")
            self.check_one_context()
            return None
        if self.is_read is None:
            raise ValueError("target_segments: is_read is missing; give the RecurrentEncoderOutput of the encoder")
        is_read_BN = self.is_read.cpu()
        given_BN = torch.ones_like(is_read_BN) if target_segments_BN is None else target_segments_BN.cpu()
        if given_BN.shape != is_read_BN.shape:
            raise ValueError(
                f"target_segments has shape {tuple(given_BN.shape)}, but encoder_outputs have "
                f"{tuple(is_read_BN.shape)} documents and segments"
            )
        is_same = held_BN is not None and torch.equal(held_BN, given_BN)
        if self.last_hidden_state.dim() == 4:
            # a context after each segment; without sections, it does not depend on the targets
            is_same = config.decoder_context != "section" or bool((given_BN | ~is_read_BN).all())
        self._check_same(is_same, f"the {int(given_BN.sum())} segments of decode_at and target_segments")
        return to_device(given_BN, self.is_read.device)

    def _check_same(self, is_same: bool, needed: str) -> None:
        if is_same:
            return
        held = "the last segment of each document"
        if self.target_segments is not None:
            held = f"{int(self.target_segments.sum())} other segments"
        raise ValueError(
            f"target_segments: encoder_outputs of shape {tuple(self.last_hidden_state.shape)} hold contexts after "
            f"{held}, but contexts after {needed} are needed; call the encoder with the same decode_at and "
            "target_segments"
        )

    def without_segments(self) -> "RecurrentEncoderOutput":
        """Return the outputs of one segment with `hidden_states` and `attentions` in BART's shapes."""
        parts = {"hidden_states": self.hidden_states, "attentions": self.attentions}
        plain: dict[str, Any] = {
            name: part and tuple(layer.squeeze(1) for layer in part) for name, part in parts.items()
        }
        return replace(self, **plain)

    def unaligned(self, batch: SegmentedBatch) -> "RecurrentEncoderOutput":
        """Return the outputs in the order of segments that `batch` had before its documents were aligned."""
        hidden, mask, packing, shift = self.last_hidden_state, self.context_mask, self.packing, batch.unalign
        order_M = torch.empty(0) if batch.target_segments is None else batch.target_order()
        host_mask = self.host_mask
        if hidden.dim() == 4:
            hidden, mask, host_mask = shift(hidden), shift(mask), None
        elif (order_M.diff() < 0).any() and packing is None:
            hidden, mask = (take(part, to_device(order_M, part.device)) for part in (hidden, mask))
            host_mask = None if host_mask is None else host_mask[order_M]
        elif packing is not None:
            packing = Packing(packing.sizes, order_M.argsort()[packing.order])
        is_target = torch.ones_like(batch.is_read) if batch.decodes_every_segment else None
        targets = is_target if batch.target_segments is None else shift(batch.target_segments)
        return RecurrentEncoderOutput(
            last_hidden_state=hidden,
            hidden_states=self.hidden_states and tuple(map(shift, self.hidden_states)),
            attentions=self.attentions and tuple(map(shift, self.attentions)),
            context_mask=mask,
            is_read=shift(self.is_read),
            n_memory=self.n_memory,
            has_padding=self.has_padding,
            target_segments=targets,
            state=self.state,
            packing=packing,
            host_mask=host_mask,
        )

    def groups(self) -> list[tuple["RecurrentEncoderOutput", Tensor]]:
        """Unpack the contexts: per group, rows `(m, A, D)` and their indices, on the CPU."""
        assert self.packing is not None
        packed = self.last_hidden_state, self.context_mask
        unpacked = ([part.squeeze(0) for part in self.packing.unpack(whole, dim=1)] for whole in packed)
        order = self.packing.order.split([n_rows for n_rows, _ in self.packing.sizes])
        return [
            (RecurrentEncoderOutput(last_hidden_state=hidden, context_mask=mask, n_memory=self.n_memory), number)
            for hidden, mask, number in zip(*unpacked, order, strict=True)
        ]

    def rows(self, chosen: Tensor) -> "RecurrentEncoderOutput":
        """Select contexts, by row index or by segment `(B, N)`, as one batch `(M, A, D)`."""
        return RecurrentEncoderOutput(
            last_hidden_state=take(self.last_hidden_state, chosen),
            context_mask=take(self.context_mask, chosen),
            n_memory=self.n_memory,
            has_padding=self.has_padding,
        )


def given_on(state: RecurrentState | None, after: RecurrentState | None) -> RecurrentState | None:
    """Return `after`, the state for a model's outputs; None if no state was given and nothing is carried."""
    return after if state is not None or (after is not None and after.carries_anything()) else None


@dataclass
class RecurrentBartModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` and the `state` after the last segment; None where nothing is carried."""

    state: RecurrentState | None = None


@dataclass
class RecurrentBartLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and the `state` after the last segment; None where nothing is carried.

    With `labels` `(B, N, T)`, `logits` are `(B, N, T, V)`, zero for segments without a target.
    `encoder_last_hidden_state` is then None, because contexts have a row per target, not per document.
    """

    state: RecurrentState | None = None


def with_final_norm(output: Any, norm: nn.Module | None) -> Any:
    """Apply the norm after the last layer, if there is one, to the output of an encoder or decoder in place."""
    if norm is not None:
        output.last_hidden_state = norm(output.last_hidden_state)
        if output.hidden_states:
            output.hidden_states = (*output.hidden_states[:-1], output.last_hidden_state)
    return output
