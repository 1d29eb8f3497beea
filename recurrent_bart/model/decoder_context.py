"""What the decoder attends to: states and tokens, after the last segment or after each.

Shape suffixes: B documents, N segments, M segments after which there is a context, K segments up to one of them,
X positions that one segment adds, Y positions of segments read before, P prefix length, L tokens in a segment,
A attended length, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.grid import GridOutput
from recurrent_bart.model.modeling_outputs import Packing, RecurrentEncoderOutput, take
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import on_device, to_device

# what is attended to, and where that is something, or of which segment, by its number; 0: nothing
Block = tuple[Tensor, Tensor]

# contexts of sumpubmed's sections, 1 to 16 segments, are six times as long as one group, of which a step took 191 ms on
# an H100, in groups of 1, 2, up to 4, 8 and 16 87; of at most 2 segments 1.6 times as long, of which it took 74 and 79
LEAST_SAVING = 2


def encoder_output(
    config: RecurrentBartConfig,
    grid: GridOutput,
    mask_BNL: Tensor,
    state: RecurrentState | None,
    every_segment: bool,
    marked_BN: Tensor | None = None,
    may_pack: bool = False,
) -> RecurrentEncoderOutput:
    """The decoder's context and the state, from the grid's outputs.

    Args:
        config: The architecture; `decoder_context` chooses.
        grid: Outputs of the segments that are kept.
        mask_BNL: 1 at tokens, on the host, where the masks are put together.
        state: What was read before.
        every_segment: Give the context after each segment, `(B, N, A, D)`.
        marked_BN: Booleans on the host, with `every_segment`: give the context after those that are marked, where
            sections end, `(M, A, D)`, or if none is after the last one of the first document; None: after each.
        may_pack: With `marked_BN`: pack contexts that are not all about as long.
    """
    is_read_BN = mask_BNL.bool().any(dim=-1)
    tokens = torch.stack(grid.tokens, dim=1), mask_BNL[:, -len(grid.tokens) :].bool()
    blocks = [tokens]
    if grid.memories:
        memory_BNPD = torch.stack(grid.memories, dim=1)
        read_BNP = is_read_BN[:, -len(grid.memories) :].unsqueeze(-1).expand(memory_BNPD.shape[:3])
        blocks.insert(0, (memory_BNPD, read_BNP))
    wanted_BN = torch.full_like(is_read_BN, every_segment)
    wanted_BN[:, -1] = True
    if marked_BN is not None:
        wanted_BN = target_or_last_segment(marked_BN)
    grows = {"last": None, "memory": 0}.get(config.decoder_context, len(blocks) - 1)
    several, groups_BN = None, [wanted_BN]
    if grows is not None:
        ends_BN = marked_BN if marked_BN is not None else wanted_BN & every_segment
        several = _SeveralSegments(config, blocks[grows], is_read_BN, state, ends_BN)
        # states are few, and in a group they would be of another number
        if may_pack and config.decoder_context != "memory":
            groups_BN = several.of_similar_length(wanted_BN)

    def part(number: int, group_BN: Tensor) -> Block:
        if several is not None and number == grows:
            return several.after(group_BN) if every_segment else several.after_all()
        # of as many segments as were kept
        return _at(blocks[number], group_BN[:, -blocks[number][0].shape[1] :])

    packing = None
    contexts = [[part(number, group_BN) for number in range(len(blocks))] for group_BN in groups_BN]
    hidden, mask = _join(contexts[0])
    if len(contexts) > 1:
        hidden, mask, packing = _pack([_join(parts) for parts in contexts], groups_BN, wanted_BN)
    elif every_segment and marked_BN is None:
        hidden, mask = (part.unflatten(0, wanted_BN.shape) for part in (hidden, mask))
    is_read_BN, is_seen = (on_device(known, hidden.device) for known in (is_read_BN, mask))
    position_B = is_read_BN.sum(dim=1) + (0 if state is None else state.position)
    memory = None if grid.memory is None else grid.memory.transpose(0, 1)
    return RecurrentEncoderOutput(
        last_hidden_state=hidden,
        context_mask=is_seen.to(mask_BNL.dtype),
        has_padding=not mask.all(),
        hidden_states=_by_layer(grid.hidden_states),
        attentions=_by_layer(grid.attentions),
        is_read=is_read_BN,
        n_memory=contexts[0][0][0].shape[1] if grid.memories else 0,
        state=RecurrentState(position_B, memory, *(() if several is None else several.past)),
        packing=packing,
    )


def target_or_last_segment(marked_BN: Tensor) -> Tensor:
    """Booleans with at least one that is true: so many contexts as are wanted, and never none."""
    marked_BN = marked_BN.clone()
    marked_BN[0, -1] |= ~marked_BN.any()
    return marked_BN


def _at(block: Block, wanted_BN: Tensor) -> Block:
    """What segments add themselves, of those that are wanted: `(M, X, ...)`."""
    return take(block[0], wanted_BN), block[1][wanted_BN]


class _SeveralSegments:
    """What the decoder sees of several segments.

    Args:
        config: The architecture.
        block: What each segment adds.
        is_read_BN: False where a document has no such segment.
        state: What was read before.
        ends_BN: Where sections end.

    Attributes:
        past: For the state, what of all that was read will still be seen after another segment.
    """

    def __init__(
        self,
        config: RecurrentBartConfig,
        block: Block,
        is_read_BN: Tensor,
        state: RecurrentState | None,
        ends_BN: Tensor,
    ):
        self.block, self.state, self.window = block, state, config.bptt_window
        self.number_BN = _numbers(is_read_BN, state)
        is_cut = config.decoder_context == "section"
        # a segment that its document does not have ends nothing
        ends_BN = ends_BN & is_read_BN if is_cut else torch.zeros_like(ends_BN)
        self.least_BN = _least_seen(self.number_BN, ends_BN, config.context_segments)
        # such a one sees something too, which nobody reads
        self.n_seen_BN = (self.number_BN - self.least_BN + 1)[:, :-1].clamp(min=1)
        self.past = self._read_so_far(self.least_BN[:, -1])

    def after_all(self) -> Block:
        """After the last segment, `(B, A, ...)`."""
        hidden, number = self.past
        # else nothing is left behind, and all that was read is not put together twice
        if not torch.equal(self.least_BN[:, -2], self.least_BN[:, -1]):
            hidden, number = self._read_so_far(self.least_BN[:, -2])
        return hidden, number > 0

    def after(self, wanted_BN: Tensor) -> Block:
        """After segments that are wanted, `(M, Y + K * X, ...)`."""
        n_segments, device = wanted_BN.shape[1], self.block[0].device
        row_M, place_M = wanted_BN.nonzero(as_tuple=True)
        least_M1 = self.least_BN[row_M, place_M].unsqueeze(1)
        # K, segments up to each one that are looked at
        n_back = min(int(self.n_seen_BN[wanted_BN].max()), n_segments)
        place_MK = place_M.unsqueeze(1) + torch.arange(1 - n_back, 1)
        chosen_MK = row_M.unsqueeze(1), place_MK.clamp(min=0)
        is_seen_MK = (place_MK >= 0) & (self.number_BN[chosen_MK] >= least_M1)
        hidden_MKXD = self.block[0][tuple(to_device(part, device) for part in chosen_MK)]
        if self.window is not None:
            # gradient goes no further back than the state's does
            windows_MK = (n_segments - 1 - place_MK) // self.window
            is_same_MK = to_device(windows_MK == windows_MK[:, -1:], device)
            hidden_MKXD = torch.where(is_same_MK[..., None, None], hidden_MKXD, hidden_MKXD.detach())
        hidden, mask = hidden_MKXD.flatten(1, 2), (self.block[1][chosen_MK] & is_seen_MK.unsqueeze(2)).flatten(1, 2)
        if self.state is not None and self.state.context is not None:
            assert self.state.context_number is not None
            past_MY = self.state.context_number.cpu()[row_M] >= least_M1
            if past_MY.any():
                past_MYD = self.state.context.to(hidden.dtype)[to_device(row_M, device)]
                hidden, mask = torch.cat([past_MYD, hidden], dim=1), torch.cat([past_MY, mask], dim=1)
        return hidden, mask

    def of_similar_length(self, wanted_BN: Tensor) -> list[Tensor]:
        """Segments that are wanted, `(B, N)`, in groups: those that see 1 segment, up to 4, up to 16 and so on.

        Or as one group, if that is no more than `LEAST_SAVING` times as much: a group costs each layer of the decoder
        some kernels.
        """
        # exponents of the powers of 2 that are not less
        exponent_BN = (self.n_seen_BN - 1).double().frexp().exponent
        group_BN = (exponent_BN + 1) // 2
        groups_BN = [wanted_BN & (group_BN == group) for group in group_BN[wanted_BN].unique()]
        as_one, as_groups = (
            sum(len(n_seen) * int(n_seen.max()) for n_seen in (self.n_seen_BN[chosen_BN] for chosen_BN in groups))
            for groups in ([wanted_BN], groups_BN)
        )
        return groups_BN if as_one > LEAST_SAVING * as_groups else [wanted_BN]

    def _read_so_far(self, least_B: Tensor) -> Block:
        """What all segments add, from the least one on, and of which each is: `(B, Y + N * X, ...)`."""
        hidden_BAD = self.block[0].flatten(1, 2)
        number_BA = (self.block[1] * self.number_BN[:, :-1].unsqueeze(2)).flatten(1, 2)
        if self.state is not None and self.state.context is not None:
            assert self.state.context_number is not None
            hidden_BAD = torch.cat([self.state.context.to(hidden_BAD.dtype), hidden_BAD], dim=1)
            number_BA = torch.cat([self.state.context_number.cpu(), number_BA], dim=1)
        number_BA = number_BA * (number_BA >= least_B.unsqueeze(1))
        # what nobody sees any more, in front
        n_gone = int((number_BA.amax(dim=0) > 0).long().cumsum(dim=0).eq(0).sum())
        return hidden_BAD[:, n_gone:], number_BA[:, n_gone:]


def section_starts(ends_BN: Tensor) -> Tensor:
    """Where the section begins that each segment belongs to, and one that came behind them: `(B, N + 1)`.

    Args:
        ends_BN: Booleans, True at the last segment of a section.
    """
    behind_BN = torch.arange(1, ends_BN.shape[1] + 1, device=ends_BN.device)
    return nn.functional.pad(ends_BN * behind_BN, (1, 0)).cummax(dim=1).values


def _numbers(is_read_BN: Tensor, state: RecurrentState | None) -> Tensor:
    """Of each segment and of one behind them, which one of its document it is, counted from 1: `(B, N + 1)`."""
    number_BN = is_read_BN.cumsum(dim=1)
    if state is not None:
        number_BN = number_BN + state.position.cpu().unsqueeze(1)
    return torch.cat([number_BN, number_BN[:, -1:] + 1], dim=1)


def _least_seen(number_BN: Tensor, ends_BN: Tensor, most: int) -> Tensor:
    """The first segment, by number, that the decoder sees after each of those of `_numbers`.

    Args:
        number_BN: From `_numbers`.
        ends_BN: Where sections end; what is in front of one is not seen behind it.
        most: Segments that are seen at most; -1: all.
    """
    first_BN = section_starts(ends_BN)
    # a section that has begun before
    least_BN = number_BN.gather(1, first_BN).masked_fill(first_BN == 0, 1)
    return least_BN if most == -1 else torch.maximum(least_BN, number_BN - most + 1)


def _pack(contexts: Sequence[Block], groups_BN: Sequence[Tensor], wanted_BN: Tensor) -> tuple[Tensor, Tensor, Packing]:
    """Contexts of groups as one row `(1, A, D)`."""
    all_hidden, all_masks = zip(*contexts, strict=True)
    hidden, mask = (torch.cat([part.flatten(0, 1) for part in parts]).unsqueeze(0) for parts in (all_hidden, all_masks))
    number_BN = wanted_BN.flatten().cumsum(dim=0).view(wanted_BN.shape) - 1
    sizes = [(part.shape[0], part.shape[1]) for part in all_hidden]
    return hidden, mask, Packing(sizes, torch.cat([number_BN[group_BN] for group_BN in groups_BN]))


def _join(blocks: list[Block]) -> Block:
    """States and tokens as one context `(M, A, D)`.

    A block with nothing in it is of a segment that its document does not have. It is seen as it is: nobody reads what
    comes out, and a softmax over nothing would not be finite.
    """
    masks = [mask | ~mask.any(dim=-1, keepdim=True) for _, mask in blocks]
    return torch.cat([hidden for hidden, _ in blocks], dim=1), torch.cat(masks, dim=1)


def _by_layer(segments: list[list[Tensor]]) -> tuple[Tensor, ...] | None:
    """Of each layer, its tensors of all segments, stacked behind the batch."""
    return tuple(torch.stack(layer, dim=1) for layer in zip(*segments, strict=True)) or None
