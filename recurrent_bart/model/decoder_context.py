"""Context of the decoder: the states and tokens that it attends to, after the last segment or after each segment.

Shape suffixes: B documents, N segments, M contexts, K segments that a context looks back over, X positions that one
segment adds, Y positions carried in the state, P prefix length, L tokens in a segment, A attended length, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.execution.grid import GridOutput
from recurrent_bart.model.modeling_outputs import Packing, RecurrentEncoderOutput, take
from recurrent_bart.recurrence.bptt import target_windows
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import on_device, to_device
from recurrent_bart.recurrence.segmented_batch import SegmentedBatch

# positions to attend to, and their mask: booleans, or the number of each position's segment, 0 at padding
Block = tuple[Tensor, Tensor]

# Measured on an H100. Contexts after sumpubmed's sections have 1 to 16 segments: one group has six times as many
# positions as groups of 1, 2, up to 4, 8 and 16 segments; a step took 191 ms with one group and 87 ms with these
# groups. For contexts of at most 2 segments, it has 1.6 times as many positions; a step took 74 ms and 79 ms.
LEAST_SAVING = 2


def encoder_output(
    config: RecurrentBartConfig,
    grid: GridOutput,
    batch: SegmentedBatch,
    state: RecurrentState | None,
    may_pack: bool = False,
) -> RecurrentEncoderOutput:
    """Build the encoder's output (the decoder's context and the new state) from the output of the grid of cells.

    Contexts are `(B, A, D)` after the last segment, `(B, N, A, D)` after every segment, or `(M, A, D)` after target
    segments, where sections end. Without any target segment, the context after the first document's end is returned.
    `may_pack` packs the contexts of target segments if their lengths differ much.
    """
    mask_BNL, is_read_BN, target_segments_BN = batch.attention_mask, batch.is_read, batch.target_segments
    tokens = torch.stack(grid.tokens, dim=1), mask_BNL[:, -len(grid.tokens) :].bool()
    blocks = [tokens]
    if grid.states:
        state_BNPD = torch.stack(grid.states, dim=1)
        read_BNP = is_read_BN[:, -len(grid.states) :].unsqueeze(-1).expand(state_BNPD.shape[:3])
        blocks.insert(0, (state_BNPD, read_BNP))
    selected_BN = torch.full_like(is_read_BN, batch.decodes_every_segment)
    selected_BN[:, -1] = True
    if target_segments_BN is not None:
        selected_BN = target_or_last_segment(target_segments_BN)
    last = None
    if config.decoder_context in ("last", "memory"):
        last = _last_tokens(grid.tokens[-1], mask_BNL[:, -1].bool(), state)
    grows = {"last": None, "memory": 0}.get(config.decoder_context, len(blocks) - 1)
    several, groups_BN, reads_all = None, [selected_BN], bool(is_read_BN[:, -1].all())
    if grows is not None:
        ends_BN = selected_BN & batch.decodes_every_segment if target_segments_BN is None else target_segments_BN
        several = _SeveralSegments(config, blocks[grows], is_read_BN, state, ends_BN)
        # packing saves little with few state positions, and the number of state positions would differ between groups
        if may_pack and config.decoder_context != "memory":
            groups_BN = several.groups_of_similar_length(selected_BN)

    def part(number: int, group_BN: Tensor) -> Block:
        if several is not None and number == grows:
            return several.after(group_BN) if batch.decodes_several_segments else several.after_all()
        if last is not None and number == len(blocks) - 1 and not (batch.decodes_several_segments or reads_all):
            return last[0], last[1].cpu()
        # a block may cover only the last segments
        return _at(blocks[number], group_BN[:, -blocks[number][0].shape[1] :])

    packing = None
    contexts = [[part(number, group_BN) for number in range(len(blocks))] for group_BN in groups_BN]
    hidden, mask = _join(contexts[0])
    if len(contexts) > 1:
        hidden, mask, packing = _pack([_join(parts) for parts in contexts], groups_BN, selected_BN)
    elif batch.decodes_every_segment and target_segments_BN is None:
        hidden, mask = (part.unflatten(0, selected_BN.shape) for part in (hidden, mask))
    has_padding = not mask.all()
    is_read_BN, is_seen = (on_device(known, hidden.device) for known in (is_read_BN, mask))
    position_B = is_read_BN.sum(dim=1) + (0 if state is None else state.position)
    memory = None if grid.memory is None else grid.memory.transpose(0, 1)
    return RecurrentEncoderOutput(
        last_hidden_state=hidden,
        context_mask=is_seen.to(mask_BNL.dtype),
        has_padding=has_padding,
        hidden_states=_by_layer(grid.hidden_states),
        attentions=_by_layer(grid.attentions),
        is_read=is_read_BN,
        n_memory=contexts[0][0][0].shape[1] if grid.states else 0,
        state=RecurrentState(position_B, memory, *(several.past if several else (None, None)), *(last or ())),
        packing=packing,
        host_mask=mask if has_padding and mask.device.type == "cpu" else None,
    )


def target_or_last_segment(target_segments_BN: Tensor) -> Tensor:
    """Return a copy of the booleans; if all are False, set the last segment of the first document to True."""
    target_segments_BN = target_segments_BN.clone()
    target_segments_BN[0, -1] |= ~target_segments_BN.any()
    return target_segments_BN


def _last_tokens(new_BLD: Tensor, new_mask_BL: Tensor, state: RecurrentState | None) -> Block:
    """Return the tokens of each document's last segment, from the state if the document reads nothing in this call."""
    is_new_B1, device = new_mask_BL.any(dim=1, keepdim=True), new_BLD.device
    new = new_BLD, on_device(new_mask_BL, device)
    if is_new_B1.all() or state is None or state.tokens is None:
        return new
    assert state.tokens_mask is not None
    kept = state.tokens.to(new_BLD.dtype), state.tokens_mask
    most = max(new[0].shape[1], kept[0].shape[1])
    (new_BLD, new_mask_BL), (kept_BLD, kept_mask_BL) = (_lengthened(block, most) for block in (new, kept))
    is_new_B1 = on_device(is_new_B1, device)
    hidden_BLD = torch.where(is_new_B1.unsqueeze(2), new_BLD, kept_BLD)
    return hidden_BLD, torch.where(is_new_B1, new_mask_BL, kept_mask_BL)


def _lengthened(block: Block, n_positions: int) -> Block:
    n_missing = n_positions - block[0].shape[1]
    return nn.functional.pad(block[0], (0, 0, 0, n_missing)), nn.functional.pad(block[1], (0, n_missing))


def _at(block: Block, selected_BN: Tensor) -> Block:
    return take(block[0], selected_BN), block[1][selected_BN]


class _SeveralSegments:
    """Decoder contexts that grow with the number of segments.

    `past` is the context after the last segment, which the state carries.
    """

    def __init__(
        self,
        config: RecurrentBartConfig,
        block: Block,
        is_read_BN: Tensor,
        state: RecurrentState | None,
        ends_BN: Tensor,
    ):
        self.block, self.state, self.is_read_BN = block, state, is_read_BN
        self.windows = target_windows(config, is_read_BN.shape[1])
        self.number_BN = _numbers(is_read_BN, state)
        is_cut = config.decoder_context == "section"
        # a segment that its document does not have ends no section
        ends_BN = ends_BN & is_read_BN if is_cut else torch.zeros_like(ends_BN)
        self.least_BN = _least_seen(self.number_BN, ends_BN, config.context_segments)
        # at least 1 also for a segment that its document does not have; nothing reads its context
        self.n_seen_BN = (self.number_BN - self.least_BN + 1)[:, :-1].clamp(min=1)
        # the same distance in segments of this call; segments that a document lacks in between count too
        first_BN = torch.searchsorted(self.number_BN[:, :-1].contiguous(), self.least_BN[:, :-1].contiguous())
        self.n_back_BN = (torch.arange(1, is_read_BN.shape[1] + 1) - first_BN).clamp(min=1)
        self.past = self._read_so_far()

    def after_all(self) -> Block:
        """Return the contexts after the last segment, `(B, A, ...)`."""
        hidden, number = self.past
        return hidden, number != 0

    def after(self, selected_BN: Tensor) -> Block:
        """Return the contexts after the segments in `selected_BN`, `(M, Y + K * X, ...)`."""
        n_segments, device = selected_BN.shape[1], self.block[0].device
        row_M, segment_M = selected_BN.nonzero(as_tuple=True)
        least_M1 = self.least_BN[row_M, segment_M].unsqueeze(1)
        # K
        n_back = min(int(self.n_back_BN[selected_BN].max()), n_segments)
        segment_MK = segment_M.unsqueeze(1) + torch.arange(1 - n_back, 1)
        index_MK = row_M.unsqueeze(1), segment_MK.clamp(min=0)
        is_seen_MK = (segment_MK >= 0) & (self.number_BN[index_MK] >= least_M1)
        hidden_MKXD = self.block[0][tuple(to_device(part, device) for part in index_MK)]
        hidden_MKXD = self._within_window(hidden_MKXD, segment_MK, segment_M)
        hidden, mask = hidden_MKXD.flatten(1, 2), (self.block[1][index_MK] & is_seen_MK.unsqueeze(2)).flatten(1, 2)
        if self.state is not None and self.state.context is not None:
            past_MYD, past_MY = self._after_in_state(self.state, row_M, segment_M)
            if past_MY.any():
                hidden = torch.cat([past_MYD.to(hidden.dtype), hidden], dim=1)
                mask = torch.cat([past_MY, mask], dim=1)
        return hidden, mask

    def _after_in_state(self, state: RecurrentState, row_M: Tensor, segment_M: Tensor) -> Block:
        """Return the positions that the state carries of the contexts after segments, `(M, Y, ...)`."""
        assert state.context is not None
        assert state.context_number is not None
        number_MY = state.context_number.cpu()[row_M]
        is_seen_MY = number_MY >= self.least_BN[row_M, segment_M].unsqueeze(1)
        is_used_Y = is_seen_MY.any(dim=0)
        past_MYD = _columns(state.context, is_used_Y)[to_device(row_M, state.context.device)]
        # the last segment of the state has the index before the first segment that the document reads in this call
        n_before_B = self.number_BN[:, 0] - self.is_read_BN[:, 0].long()
        first_B = (self.number_BN[:, :-1] <= n_before_B.unsqueeze(1)).sum(dim=1)
        index_MY = number_MY[:, is_used_Y] + (first_B - n_before_B - 1)[row_M].unsqueeze(1)
        return self._within_window(past_MYD, index_MY, segment_M), is_seen_MY[:, is_used_Y]

    def _within_window(self, hidden: Tensor, index_MK: Tensor, segment_M: Tensor) -> Tensor:
        """Detach the hidden states `(M, K, ...)` of segments `index_MK` outside the windows of segments `segment_M`.

        With targets per segment, each window has its own backward pass in training.
        """
        if self.windows.size is None or not hidden.requires_grad:
            return hidden
        is_same_MK = self.windows.number(index_MK) == self.windows.number(segment_M).unsqueeze(1)
        is_same_MK = to_device(is_same_MK, hidden.device).view(*index_MK.shape, *[1] * (hidden.dim() - 2))
        return torch.where(is_same_MK, hidden, hidden.detach())

    def groups_of_similar_length(self, selected_BN: Tensor) -> list[Tensor]:
        """Split `selected_BN` into groups whose contexts have 1 segment, 2 to 4 segments, 5 to 16 segments and so on.

        Return a single group if it has at most `LEAST_SAVING` times as many positions as all these groups: each group
        costs kernel launches in each layer.
        """
        # log2, rounded up
        exponent_BN = (self.n_seen_BN - 1).double().frexp().exponent
        group_BN = (exponent_BN + 1) // 2
        groups_BN = [selected_BN & (group_BN == group) for group in group_BN[selected_BN].unique()]
        as_one, as_groups = (
            sum(len(n_seen) * int(n_seen.max()) for n_seen in (self.n_seen_BN[chosen_BN] for chosen_BN in groups))
            for groups in ([selected_BN], groups_BN)
        )
        return groups_BN if as_one > LEAST_SAVING * as_groups else [selected_BN]

    def _read_so_far(self) -> Block:
        """Return the positions in the contexts after the last segment, and their numbers as in `RecurrentState`."""
        least_B1, next_least_B1 = self.least_BN[:, -2:].split(1, dim=1)
        number_BNX = self.block[1] * self.number_BN[:, :-1].unsqueeze(2)
        number_BNX = number_BNX * (number_BNX >= least_B1.unsqueeze(2))
        # only segments and carried positions that some context shows
        is_used_N = (number_BNX != 0).any(dim=2).any(dim=0)
        hidden_BAD = _columns(self.block[0], is_used_N).flatten(1, 2)
        number_BA = number_BNX[:, is_used_N].flatten(1, 2)
        if self.state is not None and self.state.context is not None:
            assert self.state.context_number is not None
            past_BY = self.state.context_number.cpu()
            # a document that reads nothing in this call keeps its context
            past_BY = past_BY * ((past_BY >= least_B1) | ~self.is_read_BN.any(dim=1, keepdim=True))
            is_used_Y = (past_BY != 0).any(dim=0)
            past_BYD = _columns(self.state.context, is_used_Y).to(hidden_BAD.dtype)
            hidden_BAD = torch.cat([past_BYD, hidden_BAD], dim=1)
            number_BA = torch.cat([past_BY[:, is_used_Y], number_BA], dim=1)
        return hidden_BAD, torch.where(number_BA >= next_least_B1, number_BA, -number_BA.abs())


def _columns(tensor: Tensor, is_used_A: Tensor) -> Tensor:
    """Select along dimension 1, without a copy if all unused columns come first; `is_used_A` is on the CPU."""
    n_unused = int((~is_used_A).sum())
    if is_used_A[n_unused:].all():
        return tensor[:, n_unused:]
    return tensor.index_select(1, to_device(is_used_A.nonzero().squeeze(1), tensor.device))


def section_starts(ends_BN: Tensor) -> Tensor:
    """Return, for each segment, the index of the first segment in the same section, `(B, N + 1)`.

    `ends_BN` is True at the last segment of a section. The last column is for the segment that would come next.
    """
    behind_BN = torch.arange(1, ends_BN.shape[1] + 1, device=ends_BN.device)
    return nn.functional.pad(ends_BN * behind_BN, (1, 0)).cummax(dim=1).values


def _numbers(is_read_BN: Tensor, state: RecurrentState | None) -> Tensor:
    """Return each segment's number in its document, counted from 1; the last column is for the next segment."""
    number_BN = is_read_BN.cumsum(dim=1)
    if state is not None:
        number_BN = number_BN + state.position.cpu().unsqueeze(1)
    return torch.cat([number_BN, number_BN[:, -1:] + 1], dim=1)


def _least_seen(number_BN: Tensor, ends_BN: Tensor, most: int) -> Tensor:
    """Return, for each segment, the number of the first segment in its decoder context, `(B, N + 1)`.

    A context has no segment of an earlier section, and at most `most` segments; -1: all.
    """
    first_BN = section_starts(ends_BN)
    # one more than the number before the section, because the first segment may be one that the document lacks
    least_BN = number_BN.gather(1, (first_BN - 1).clamp(min=0)) + 1
    # the section began in an earlier call
    least_BN = least_BN.masked_fill(first_BN == 0, 1)
    return least_BN if most == -1 else torch.maximum(least_BN, number_BN - most + 1)


def _pack(
    contexts: Sequence[Block], groups_BN: Sequence[Tensor], selected_BN: Tensor
) -> tuple[Tensor, Tensor, Packing]:
    all_hidden, all_masks = zip(*contexts, strict=True)
    hidden, mask = (torch.cat([part.flatten(0, 1) for part in parts]).unsqueeze(0) for parts in (all_hidden, all_masks))
    number_BN = selected_BN.flatten().cumsum(dim=0).view(selected_BN.shape) - 1
    sizes = [(part.shape[0], part.shape[1]) for part in all_hidden]
    return hidden, mask, Packing(sizes, torch.cat([number_BN[group_BN] for group_BN in groups_BN]))


def _join(blocks: list[Block]) -> Block:
    # A block whose mask is all False belongs to a segment that its document does not have. Its mask becomes all True:
    # a softmax over nothing is not finite, and nothing reads the result.
    masks = [mask | ~mask.any(dim=-1, keepdim=True) for _, mask in blocks]
    return torch.cat([hidden for hidden, _ in blocks], dim=1), torch.cat(masks, dim=1)


def _by_layer(segments: list[list[Tensor]]) -> tuple[Tensor, ...] | None:
    return tuple(torch.stack(layer, dim=1) for layer in zip(*segments, strict=True)) or None
