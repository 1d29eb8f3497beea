"""What the decoder attends to: states and tokens, after the last segment or after each.

Shape suffixes: B documents, N segments, M segments after which there is a context, K segments up to one of them,
X positions that one segment adds, Y positions of segments read before, P prefix length, L tokens in a segment,
A attended length, D model width.
"""

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import RecurrentEncoderOutput, take
from recurrent_bart.prefix_recurrence import RecurrentState
from recurrent_bart.schedules import GridOutput
from recurrent_bart.segmentation import on_device

# what is attended to, and where that is something, or of which segment, by its number; 0: nothing
Block = tuple[Tensor, Tensor]


def encoder_output(
    config: RecurrentBartConfig,
    grid: GridOutput,
    mask_BNL: Tensor,
    state: RecurrentState | None,
    every_segment: bool,
    marked_BN: Tensor | None = None,
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
        wanted_BN = marked_or_last(marked_BN)
    grows = {"last": None, "memory": 0}.get(config.decoder_context, len(blocks) - 1)
    contexts, past = [], None
    for number, block in enumerate(blocks):
        if number == grows:
            ends_BN = marked_BN if marked_BN is not None else wanted_BN & every_segment
            context, past = _of_several(config, block, is_read_BN, state, ends_BN, wanted_BN if every_segment else None)
            contexts.append(context)
        else:
            # of as many segments as were kept
            contexts.append(_at(block, wanted_BN[:, -block[0].shape[1] :]))
    hidden, mask = _join(contexts)
    if every_segment and marked_BN is None:
        hidden, mask = (part.unflatten(0, wanted_BN.shape) for part in (hidden, mask))
    is_read_BN, is_seen = (on_device(known, hidden.device) for known in (is_read_BN, mask))
    position_B = is_read_BN.sum(dim=1) + (0 if state is None else state.position)
    return RecurrentEncoderOutput(
        last_hidden_state=hidden,
        context_mask=is_seen.to(mask_BNL.dtype),
        has_padding=not mask.all(),
        hidden_states=_by_layer(grid.hidden_states),
        attentions=_by_layer(grid.attentions),
        is_read=is_read_BN,
        n_memory=contexts[0][0].shape[1] if grid.memories else 0,
        state=RecurrentState(position_B, None if grid.memory is None else grid.memory.transpose(0, 1), *(past or ())),
    )


def marked_or_last(marked_BN: Tensor) -> Tensor:
    """Booleans with at least one that is true: so many contexts as are wanted, and never none."""
    marked_BN = marked_BN.clone()
    marked_BN[0, -1] |= ~marked_BN.any()
    return marked_BN


def _at(block: Block, wanted_BN: Tensor) -> Block:
    """What segments add themselves, of those that are wanted: `(M, X, ...)`."""
    return take(block[0], wanted_BN), block[1][wanted_BN]


def _of_several(
    config: RecurrentBartConfig,
    block: Block,
    is_read_BN: Tensor,
    state: RecurrentState | None,
    ends_BN: Tensor,
    wanted_BN: Tensor | None,
) -> tuple[Block, Block]:
    """What the decoder sees of several segments, and for the state, what of it will still be seen after another one.

    Args:
        config: The architecture.
        block: What each segment adds.
        is_read_BN: False where a document has no such segment.
        state: What was read before.
        ends_BN: Where sections end.
        wanted_BN: After which segments it is seen; None: after the last one.
    """
    number_BN = _numbers(is_read_BN, state)
    own = block[0], block[1] * number_BN[:, :-1].unsqueeze(2)
    is_cut = config.decoder_context == "section"
    least_BN = _least_seen(number_BN, ends_BN if is_cut else torch.zeros_like(ends_BN), config.context_segments)
    past = _read_so_far(own, state, least_BN[:, -1])
    if wanted_BN is not None:
        hidden, number = _history(own, state, config.bptt_window, number_BN, least_BN, wanted_BN)
    elif torch.equal(least_BN[:, -2], least_BN[:, -1]):
        # nothing is left behind, and all that was read is not put together twice
        hidden, number = past
    else:
        hidden, number = _read_so_far(own, state, least_BN[:, -2])
    return (hidden, number > 0), past


def first_of_section(ends_BN: Tensor) -> Tensor:
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
    first_BN = first_of_section(ends_BN)
    # a section that has begun before
    least_BN = number_BN.gather(1, first_BN).masked_fill(first_BN == 0, 1)
    return least_BN if most == -1 else torch.maximum(least_BN, number_BN - most + 1)


def _read_so_far(own: Block, state: RecurrentState | None, least_B: Tensor) -> Block:
    """What all segments add to the context, from the least one on, and of which each is: `(B, Y + N * X, ...)`."""
    hidden_BAD, number_BA = own[0].flatten(1, 2), own[1].flatten(1, 2)
    if state is not None and state.context is not None:
        assert state.context_number is not None
        hidden_BAD = torch.cat([state.context.to(hidden_BAD.dtype), hidden_BAD], dim=1)
        number_BA = torch.cat([state.context_number.cpu(), number_BA], dim=1)
    number_BA = number_BA * (number_BA >= least_B.unsqueeze(1))
    # what nobody sees any more, in front
    n_gone = int((number_BA.amax(dim=0) > 0).long().cumsum(dim=0).eq(0).sum())
    return hidden_BAD[:, n_gone:], number_BA[:, n_gone:]


def _history(
    own: Block, state: RecurrentState | None, window: int | None, number_BN: Tensor, least_BN: Tensor, wanted_BN: Tensor
) -> Block:
    """After segments that are wanted, what they and those before them add, from the least: `(M, Y + K * X, ...)`.

    Args:
        own: What each segment adds, and which one it is.
        state: What was read before.
        window: Segments of a window that gradient does not leave.
        number_BN: From `_numbers`.
        least_BN: From `_least_seen`.
        wanted_BN: After which segments.
    """
    n_segments, device = wanted_BN.shape[1], own[0].device
    row_M, place_M = wanted_BN.nonzero(as_tuple=True)
    least_M = least_BN[row_M, place_M]
    # K, segments up to each one that are looked at
    n_back = min(max(1, int((number_BN[row_M, place_M] - least_M).max()) + 1), n_segments)
    place_MK = place_M.unsqueeze(1) + torch.arange(1 - n_back, 1)
    chosen_MK = row_M.unsqueeze(1), place_MK.clamp(min=0)
    number_MKX = own[1][chosen_MK] * (place_MK >= 0).unsqueeze(2)
    hidden_MKXD = own[0][tuple(part.to(device, non_blocking=True) for part in chosen_MK)]
    if window is not None:
        # gradient goes no further back than the state's does
        windows_MK = (n_segments - 1 - place_MK) // window
        is_same_MK = (windows_MK == windows_MK[:, -1:]).to(device, non_blocking=True)
        hidden_MKXD = torch.where(is_same_MK[..., None, None], hidden_MKXD, hidden_MKXD.detach())
    hidden, number = hidden_MKXD.flatten(1, 2), number_MKX.flatten(1, 2)
    if state is not None and state.context is not None:
        assert state.context_number is not None
        past_MYD = state.context.to(hidden.dtype)[row_M.to(device, non_blocking=True)]
        hidden = torch.cat([past_MYD, hidden], dim=1)
        number = torch.cat([state.context_number.cpu()[row_M], number], dim=1)
    return hidden, number * (number >= least_M.unsqueeze(1))


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
