"""What the decoder attends to: states and tokens, after the last segment or after each.

Shape suffixes: B documents, N segments, K segments up to one of them, X positions that one segment adds, Y positions of
segments read before, P prefix length, L tokens in a segment, A attended length, D model width.
"""

import torch
from torch import Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import RecurrentEncoderOutput
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
    ends_BN: Tensor | None = None,
) -> RecurrentEncoderOutput:
    """The decoder's context and the state, from the grid's outputs.

    Args:
        config: The architecture; `decoder_context` chooses.
        grid: Outputs of the segments that are kept.
        mask_BNL: 1 at tokens, on the host, where the masks are put together.
        state: What was read before.
        every_segment: Give the context after each segment, `(B, N, A, D)`.
        ends_BN: Booleans on the host, True where a section ends; None: after each segment, or with a context after the
            last one alone, nowhere.
    """
    is_read_BN = mask_BNL.bool().any(dim=-1)
    tokens = torch.stack(grid.tokens, dim=1), mask_BNL[:, -len(grid.tokens) :].bool()
    blocks = [tokens]
    if grid.memories:
        memory_BNPD = torch.stack(grid.memories, dim=1)
        read_BNP = is_read_BN[:, -len(grid.memories) :].unsqueeze(-1).expand(memory_BNPD.shape[:3])
        blocks.insert(0, (memory_BNPD, read_BNP))
    past = None
    if config.decoder_context != "last":
        place = 0 if config.decoder_context == "memory" else -1
        if config.decoder_context != "section" or not every_segment:
            ends_BN = torch.zeros_like(is_read_BN)
        elif ends_BN is None:
            ends_BN = torch.ones_like(is_read_BN)
        number_BN = _numbers(is_read_BN, state)
        own = blocks[place][0], blocks[place][1] * number_BN[:, :-1].unsqueeze(2)
        least_BN = _least_seen(number_BN, ends_BN, config.context_segments)
        past = _read_so_far(own, state, least_BN[:, -1])
        if every_segment:
            n_back = _longest_seen(number_BN, least_BN, ends_BN if config.decoder_context == "section" else None)
            hidden, seen = _history(own, state, config.bptt_window, least_BN[:, :-1], n_back)
        else:
            hidden, seen = (part.unsqueeze(1) for part in _read_so_far(own, state, least_BN[:, -2]))
        blocks[place] = hidden, seen > 0
    hidden, mask = _join([block if every_segment else (block[0][:, -1:], block[1][:, -1:]) for block in blocks])
    is_read_BN, is_seen = (on_device(known, hidden.device) for known in (is_read_BN, mask))
    position_B = is_read_BN.sum(dim=1) + (0 if state is None else state.position)
    return RecurrentEncoderOutput(
        last_hidden_state=hidden if every_segment else hidden.squeeze(1),
        context_mask=(is_seen if every_segment else is_seen.squeeze(1)).to(mask_BNL.dtype),
        has_padding=not mask.all(),
        hidden_states=_by_layer(grid.hidden_states),
        attentions=_by_layer(grid.attentions),
        is_read=is_read_BN,
        n_memory=blocks[0][0].shape[2] if grid.memories else 0,
        state=RecurrentState(position_B, None if grid.memory is None else grid.memory.transpose(0, 1), *(past or ())),
    )


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


def _longest_seen(number_BN: Tensor, least_BN: Tensor, wanted_BN: Tensor | None) -> int:
    """Most of these segments that are seen after one of them, or one of those that are wanted."""
    lengths_BN = (number_BN - least_BN + 1)[:, :-1]
    if wanted_BN is not None:
        lengths_BN = lengths_BN * wanted_BN
    return min(max(1, int(lengths_BN.max())), lengths_BN.shape[1])


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


def _history(own: Block, state: RecurrentState | None, window: int | None, least_BN: Tensor, n_back: int) -> Block:
    """After each segment, what it and those before it add, from the least one on: `(B, N, Y + K * X, ...)`.

    Args:
        own: What each segment adds, and which one it is.
        state: What was read before.
        window: Segments of a window that gradient does not leave.
        least_BN: From `_least_seen`.
        n_back: K, segments up to each one that are looked at.
    """
    hidden_BNKXD, number_BNKX = (_up_to_each(part, n_back) for part in own)
    n_segments, device = least_BN.shape[1], hidden_BNKXD.device
    if window is not None:
        # gradient goes no further back than the state's does
        place_NK = torch.arange(n_segments).unsqueeze(1) + torch.arange(1 - n_back, 1)
        windows_NK = (n_segments - 1 - place_NK) // window
        is_same_NK = (windows_NK == windows_NK[:, -1:]).to(device, non_blocking=True)
        hidden_BNKXD = torch.where(is_same_NK[..., None, None], hidden_BNKXD, hidden_BNKXD.detach())
    hidden, number = hidden_BNKXD.flatten(2, 3), number_BNKX.flatten(2, 3)
    if state is not None and state.context is not None:
        assert state.context_number is not None
        past_BNYD = state.context.to(hidden.dtype).unsqueeze(1).expand(-1, n_segments, -1, -1)
        past_number_BNY = state.context_number.cpu().unsqueeze(1).expand(-1, n_segments, -1)
        hidden, number = torch.cat([past_BNYD, hidden], dim=2), torch.cat([past_number_BNY, number], dim=2)
    return hidden, number * (number >= least_BN.unsqueeze(2))


def _up_to_each(part_BNX: Tensor, n_back: int) -> Tensor:
    """Of each segment the last K up to it, zero where there is none: `(B, N, K, X, ...)`."""
    padded = nn.functional.pad(part_BNX, (*[0, 0] * (part_BNX.dim() - 2), n_back - 1, 0))
    return padded.unfold(1, n_back, 1).movedim(-1, 2)


def _join(blocks: list[Block]) -> Block:
    """States and tokens as one context `(B, N, A, D)`.

    A block with nothing in it is of a segment that its document does not have. It is seen as it is: nobody reads what
    comes out, and a softmax over nothing would not be finite.
    """
    masks = [mask | ~mask.any(dim=-1, keepdim=True) for _, mask in blocks]
    return torch.cat([hidden for hidden, _ in blocks], dim=2), torch.cat(masks, dim=2)


def _by_layer(segments: list[list[Tensor]]) -> tuple[Tensor, ...] | None:
    """Of each layer, its tensors of all segments, stacked behind the batch."""
    return tuple(torch.stack(layer, dim=1) for layer in zip(*segments, strict=True)) or None
