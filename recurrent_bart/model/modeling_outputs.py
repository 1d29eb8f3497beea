"""What the models give.

Shape suffixes: B documents, N segments, L tokens in a segment, A attended length, M chosen segments, T target length,
D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import shift_segments, to_device


def take(tensor: Tensor, chosen: Tensor) -> Tensor:
    """What is chosen by number, or where booleans are true; the device is not waited for if the host has those."""
    if chosen.dtype != torch.bool:
        return tensor[chosen]
    if chosen.all():
        return tensor.flatten(0, chosen.dim() - 1)
    return tensor[_places(chosen, tensor.device)]


def put_back(taken: Tensor, chosen: Tensor) -> Tensor:
    """What `take` gave, at its places, and zero at the others."""
    if chosen.all():
        return taken.unflatten(0, chosen.shape)
    whole = taken.new_zeros(*chosen.shape, *taken.shape[1:])
    whole[_places(chosen, whole.device)] = taken
    return whole


def _order(marked_BN: Tensor, n_segments_B: Tensor) -> Tensor:
    """Numbers of rows in the order of marked segments, from that which these had before `shift_segments` moved them."""
    number_BN = shift_segments(torch.arange(marked_BN.numel()).view(marked_BN.shape), -n_segments_B)
    return number_BN[shift_segments(marked_BN, -n_segments_B)].argsort()


def _context_mask(hidden_BAD: Tensor, attention_mask: Tensor | None, n_memory: int) -> Tensor:
    """Return where the decoder may attend, `(B, A)`, from a mask of all positions or of those behind the state."""
    whole_BA = torch.ones(hidden_BAD.shape[:2], dtype=torch.long, device=hidden_BAD.device)
    if attention_mask is None or attention_mask.all():
        return whole_BA
    if attention_mask.dim() == 2 and attention_mask.shape[1] == hidden_BAD.shape[1] - n_memory:
        attention_mask = nn.functional.pad(attention_mask, (n_memory, 0), value=1)
    if attention_mask.shape != whole_BA.shape:
        raise ValueError(
            f"encoder_outputs: context_mask is missing, and attention_mask of shape {tuple(attention_mask.shape)} does "
            f"not show which of the {hidden_BAD.shape[1]} positions are padding; give the encoder's "
            f"RecurrentEncoderOutput, or attention_mask of shape {tuple(whole_BA.shape)}"
        )
    return attention_mask.to(whole_BA)


def _places(chosen: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Numbers of what is chosen, on a device that is not waited for."""
    return tuple(to_device(place, device) for place in chosen.nonzero(as_tuple=True))


@dataclass(frozen=True)
class Packing:
    """How contexts that differ in their length lie one behind the other, by groups of similar ones.

    Attributes:
        sizes: Of each group the number of contexts and of positions, to which they are padded.
        order: `(M,)`, which one each of them is, on the host.
    """

    sizes: list[tuple[int, int]]
    order: Tensor

    def unpack(self, packed: Tensor, dim: int) -> list[Tensor]:
        """Of each group `(..., m, A, ...)`, which lie behind each other in a dimension."""
        parts = packed.split([n_rows * n_positions for n_rows, n_positions in self.sizes], dim)
        return [part.unflatten(dim, size) for part, size in zip(parts, self.sizes, strict=True)]


@dataclass
class RecurrentEncoderOutput(BaseModelOutput):
    """What the decoder may attend to, and the state to go on from.

    Attributes:
        last_hidden_state: `(B, A, D)`: states, then tokens, as `config.decoder_context` has it. With
            `every_segment=True` `(B, N, A, D)`: the same after each segment; of marked ones as rows `(M, A, D)`,
            document by document, or packed, `(1, A, D)`.
        hidden_states: Token streams below and above every layer, each `(B, N, L, D)`.
        attentions: What tokens attend to in every layer, each `(B, N, H, L, A)`, prefix in front. With `pre_seq_len=0`
            and flat documents of one segment, both are BART's, without N.
        context_mask: `(B, A)` or `(B, N, A)`, 1 where there is something to attend to.
        is_read: `(B, N)` booleans, False where a document has no such segment.
        n_memory: Leading positions of `last_hidden_state` that are state.
        has_padding: Whether `context_mask` has a 0, so that nobody must look; None: unknown.
        state: The state after the last segment.
        packing: How the contexts of marked segments are packed; None: they are rows.
    """

    context_mask: Tensor | None = None
    is_read: Tensor | None = None
    n_memory: int | None = None
    has_padding: bool | None = None
    state: RecurrentState | None = None
    packing: Packing | None = None

    def as_tuple(self) -> tuple:
        """The same as a plain tuple: hooks on modules look for tensors in nothing else."""
        state = self.state and tuple(getattr(self.state, item.name) for item in fields(RecurrentState))
        plain = self.last_hidden_state, self.hidden_states, self.attentions, self.context_mask, self.is_read
        packing = self.packing and tuple(getattr(self.packing, item.name) for item in fields(Packing))
        return *plain, self.n_memory, self.has_padding, state, packing

    @classmethod
    def from_tuple(cls, values: Sequence) -> "RecurrentEncoderOutput":
        """What `as_tuple` gave."""
        *plain, state, packing = values
        return cls(*plain, state=state and RecurrentState(*state), packing=packing and Packing(*packing))

    @classmethod
    def of(
        cls,
        given: "RecurrentEncoderOutput | BaseModelOutput | Sequence",
        config: RecurrentBartConfig,
        attention_mask: Tensor | None = None,
    ) -> "RecurrentEncoderOutput":
        """Return encoder outputs that a client hands in, with the fields that BART's outputs lack.

        Args:
            given: Our outputs or their plain tuple, which are taken as they are; or BART's outputs, as an object or as
                a tuple of `last_hidden_state`, `hidden_states` and `attentions`.
            config: The architecture.
            attention_mask: With BART's outputs, 1 where the decoder may attend: `(B, A)`, or the last positions of it
                behind the state. None: everywhere.

        Raises:
            ValueError: BART's outputs do not show what the decoder needs; the message says what is missing.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, BaseModelOutput):
            given = given.last_hidden_state, given.hidden_states, given.attentions
        if len(given) == len(fields(cls)):
            return cls.from_tuple(given)
        if not 1 <= len(given) <= 3:
            raise ValueError(
                f"encoder_outputs: a tuple of {len(given)} values; a RecurrentEncoderOutput, its plain tuple of "
                f"{len(fields(cls))}, or last_hidden_state, hidden_states and attentions are needed"
            )
        hidden = given[0]
        if config.decoder_context == "memory" and config.prefix_attention == "gated":
            raise ValueError(
                'encoder_outputs: n_memory is missing. With decoder_context="memory" and prefix_attention="gated" the '
                "decoder must know how many positions are states; give the RecurrentEncoderOutput of the encoder"
            )
        n_memory = config.pre_seq_len if config.has_state and config.decoder_context != "memory" else 0
        mask = _context_mask(hidden, attention_mask, n_memory)
        return cls(*given, context_mask=mask, n_memory=n_memory, has_padding=not bool(mask.all()))

    def check_one_context(self) -> None:
        """Refuse contexts after several segments where one context per row is decoded.

        Raises:
            ValueError: There are contexts after every segment, or packed contexts.
        """
        if self.last_hidden_state.dim() != 3 or self.packing is not None:
            raise ValueError(
                f"encoder_outputs of shape {tuple(self.last_hidden_state.shape)} are contexts after several segments; "
                "one context per row (B, A, D) is needed here, generate(every_segment=...) takes several"
            )

    def check_contexts(self, chosen_BN: Tensor | None) -> Tensor:
        """Return which segments have a context, `(B, N)` booleans, where contexts after several segments are needed.

        Args:
            chosen_BN: Segments whose contexts the outputs were asked for; None: all.

        Raises:
            ValueError: The outputs do not have these contexts.
        """
        if self.is_read is None:
            raise ValueError("every_segment: encoder_outputs do not say which segments there are, is_read is missing")
        if chosen_BN is None:
            chosen_BN = torch.ones_like(self.is_read)
        if chosen_BN.shape != self.is_read.shape:
            raise ValueError(
                f"every_segment of shape {tuple(chosen_BN.shape)}: encoder_outputs are of "
                f"{tuple(self.is_read.shape)} documents and segments"
            )
        shape = tuple(self.last_hidden_state.shape)
        # where nothing is chosen there is one context all the same
        has_rows = len(shape) == 3 and shape[0] == max(1, int(chosen_BN.sum()))
        if self.packing is None and not has_rows and shape[:-2] != tuple(self.is_read.shape):
            raise ValueError(
                f"every_segment: encoder_outputs of shape {shape} are not the contexts after "
                f"{int(chosen_BN.sum())} chosen segments; the encoder must be called with the same every_segment"
            )
        return chosen_BN.to(self.is_read.device)

    def without_segments(self) -> "RecurrentEncoderOutput":
        """Return the outputs of one segment with `hidden_states` and `attentions` in BART's shapes."""
        parts = {"hidden_states": self.hidden_states, "attentions": self.attentions}
        plain: dict[str, Any] = {
            name: part and tuple(layer.squeeze(1) for layer in part) for name, part in parts.items()
        }
        return replace(self, **plain)

    def shifted(self, n_segments_B: Tensor, marked_BN: Tensor | None = None) -> "RecurrentEncoderOutput":
        """With what there is of each segment moved by `shift_segments`; rows are of these marked ones behind it."""

        def shift(tensor: Tensor) -> Tensor:
            return shift_segments(tensor, n_segments_B)

        hidden, mask, packing = self.last_hidden_state, self.context_mask, self.packing
        order_M = torch.empty(0) if marked_BN is None else _order(marked_BN, n_segments_B)
        if hidden.dim() == 4:
            hidden, mask = shift(hidden), shift(mask)
        # rows have another order only where segments without text are marked
        elif (order_M.diff() < 0).any() and packing is None:
            hidden, mask = (take(part, to_device(order_M, part.device)) for part in (hidden, mask))
        elif packing is not None:
            packing = Packing(packing.sizes, order_M.argsort()[packing.order])
        return RecurrentEncoderOutput(
            last_hidden_state=hidden,
            hidden_states=self.hidden_states and tuple(map(shift, self.hidden_states)),
            attentions=self.attentions and tuple(map(shift, self.attentions)),
            context_mask=mask,
            is_read=shift(self.is_read),
            n_memory=self.n_memory,
            has_padding=self.has_padding,
            state=self.state,
            packing=packing,
        )

    def groups(self) -> list[tuple["RecurrentEncoderOutput", Tensor]]:
        """Contexts that are packed as rows `(m, A, D)`, group by group, and which ones these are, on the host."""
        assert self.packing is not None
        packed = self.last_hidden_state, self.context_mask
        unpacked = ([part.squeeze(0) for part in self.packing.unpack(whole, dim=1)] for whole in packed)
        order = self.packing.order.split([n_rows for n_rows, _ in self.packing.sizes])
        return [
            (RecurrentEncoderOutput(last_hidden_state=hidden, context_mask=mask, n_memory=self.n_memory), number)
            for hidden, mask, number in zip(*unpacked, order, strict=True)
        ]

    def rows(self, chosen: Tensor) -> "RecurrentEncoderOutput":
        """The contexts of chosen rows by number, or after chosen segments `(B, N)`, as one batch `(M, A, D)`."""
        return RecurrentEncoderOutput(
            last_hidden_state=take(self.last_hidden_state, chosen),
            context_mask=take(self.context_mask, chosen),
            n_memory=self.n_memory,
            has_padding=self.has_padding,
        )


def given_on(state: RecurrentState | None, after: RecurrentState | None) -> RecurrentState | None:
    """Return the state for a model's outputs; None where no state came in and nothing is carried."""
    return after if state is not None or (after is not None and after.carries_anything()) else None


@dataclass
class RecurrentBartModelOutput(Seq2SeqModelOutput):
    """`Seq2SeqModelOutput` and the `state` after the last segment; None where nothing is carried."""

    state: RecurrentState | None = None


@dataclass
class RecurrentBartLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` and the `state` after the last segment; None where nothing is carried.

    With `labels` `(B, N, T)`, `logits` are `(B, N, T, V)`, zero for segments that have no target, and
    `encoder_last_hidden_state` is None, for what the decoder attends to has a row for each target, not each document.
    """

    state: RecurrentState | None = None
