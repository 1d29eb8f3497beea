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
        first_BN = first_of_section(ends_BN)
        past = _read_so_far(blocks[place], state, first_BN[:, -1])
        if every_segment:
            n_back = _longest_section(first_BN[:, :-1], ends_BN if config.decoder_context == "section" else None)
            blocks[place] = _history(blocks[place], state, config.bptt_window, first_BN[:, :-1], n_back)
        else:
            blocks[place] = past[0].unsqueeze(1), past[1].unsqueeze(1)
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


def _longest_section(first_BN: Tensor, ends_BN: Tensor | None) -> int:
    """Segments of the longest section that ends somewhere; None: any may be the end."""
    lengths_BN = torch.arange(1, first_BN.shape[1] + 1) - first_BN
    return max(1, int((lengths_BN if ends_BN is None else lengths_BN * ends_BN).max()))


def _read_so_far(own: Block, state: RecurrentState | None, first_B: Tensor) -> Block:
    """What all segments up to the last add to the context, without those in front of the first: `(B, Y + N * X, D)`."""
    n_gone, n_segments = int(first_B.min()), own[0].shape[1]
    is_in_BN = torch.arange(n_gone, n_segments) >= first_B.unsqueeze(1)
    own_BAD = own[0][:, n_gone:].flatten(1, 2)
    mask_BA = (own[1][:, n_gone:] & is_in_BN.unsqueeze(-1)).flatten(1, 2)
    if state is None or state.context is None or n_gone:
        return own_BAD, mask_BA
    past_mask_BY = state.context_mask.cpu() & (first_B == 0).unsqueeze(1)
    return torch.cat([state.context.to(own_BAD.dtype), own_BAD], dim=1), torch.cat([past_mask_BY, mask_BA], dim=1)


def _history(own: Block, state: RecurrentState | None, window: int | None, first_BN: Tensor, n_back: int) -> Block:
    """After each segment, what it and those before it in its section add: `(B, N, Y + K * X, D)`.

    Args:
        own: What each segment adds.
        state: What was read before.
        window: Segments of a window that gradient does not leave.
        first_BN: The first segment of each one's section.
        n_back: K, segments up to each one that are looked at.
    """
    hidden_BNKXD, mask_BNKX = (_up_to_each(part, n_back) for part in own)
    n_segments, device = first_BN.shape[1], hidden_BNKXD.device
    number_NK = torch.arange(n_segments).unsqueeze(1) + torch.arange(1 - n_back, 1)
    if window is not None:
        # gradient goes no further back than the state's does
        windows_NK = (n_segments - 1 - number_NK) // window
        is_same_NK = (windows_NK == windows_NK[:, -1:]).to(device, non_blocking=True)
        hidden_BNKXD = torch.where(is_same_NK[..., None, None], hidden_BNKXD, hidden_BNKXD.detach())
    mask_BNKX = mask_BNKX & (number_NK >= first_BN.unsqueeze(2)).unsqueeze(-1)
    hidden, mask = hidden_BNKXD.flatten(2, 3), mask_BNKX.flatten(2, 3)
    if state is None or state.context is None:
        return hidden, mask
    past_BNYD = state.context.to(hidden.dtype).unsqueeze(1).expand(-1, n_segments, -1, -1)
    past_mask_BNY = state.context_mask.cpu().unsqueeze(1) & (first_BN == 0).unsqueeze(2)
    return torch.cat([past_BNYD, hidden], dim=2), torch.cat([past_mask_BNY, mask], dim=2)


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
