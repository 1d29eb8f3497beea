"""What the decoder attends to: states and tokens, after the last segment or after each.

Shape suffixes: B documents, N segments, X positions that one segment adds, Y positions of segments read before,
P prefix length, L tokens in a segment, A attended length, D model width.
"""

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.prefix_recurrence import RecurrentState
from recurrent_bart.schedules import GridOutput
from recurrent_bart.segmentation import on_device

Block = tuple[Tensor, Tensor]


def encoder_output(
    config: RecurrentBartConfig, grid: GridOutput, mask_BNL: Tensor, state: RecurrentState | None, every_segment: bool
) -> RecurrentEncoderOutput:
    """The decoder's context and the state, from the grid's outputs.

    Args:
        config: The architecture; `decoder_context` chooses.
        grid: Outputs of the segments that are kept.
        mask_BNL: 1 at tokens, on the host, where the masks are put together.
        state: What was read before.
        every_segment: Give the context after each segment, `(B, N, A, D)`.
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
        past = _read_so_far(blocks[place], state)
        blocks[place] = _history(blocks[place], state, config.bptt_window, every_segment)
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


def _read_so_far(own: Block, state: RecurrentState | None) -> Block:
    """Of all segments up to the last, what they add to the context: `(B, Y + N * X, D)` and its mask."""
    own_BAD, mask_BA = own[0].flatten(1, 2), own[1].flatten(1, 2)
    if state is None or state.context is None:
        return own_BAD, mask_BA
    past_mask_BY = state.context_mask.cpu()
    return torch.cat([state.context.to(own_BAD.dtype), own_BAD], dim=1), torch.cat([past_mask_BY, mask_BA], dim=1)


def _history(own: Block, state: RecurrentState | None, window: int | None, every_segment: bool) -> Block:
    """After each segment, what it and those before it add: `(B, N, Y + N * X, D)`, or `(B, 1, ...)` after the last."""
    own_BNXD, mask_BNX = own
    if not every_segment:
        hidden, mask = _read_so_far(own, state)
        return hidden.unsqueeze(1), mask.unsqueeze(1)
    n_segments = own_BNXD.shape[1]
    is_past_NN = torch.ones(n_segments, n_segments, dtype=torch.bool).tril()
    hidden_BNNXD = own_BNXD.unsqueeze(1).expand(-1, n_segments, -1, -1, -1)
    if window is not None:
        # gradient goes no further back than the state's does
        windows = (n_segments - 1 - torch.arange(n_segments, device=own_BNXD.device)) // window
        is_same_NN = (windows.unsqueeze(1) == windows).view(1, n_segments, n_segments, 1, 1)
        hidden_BNNXD = torch.where(is_same_NN, hidden_BNNXD, hidden_BNNXD.detach())
    mask_BNNX = mask_BNX.unsqueeze(1) & is_past_NN.unsqueeze(-1)
    hidden, mask = hidden_BNNXD.flatten(2, 3), mask_BNNX.flatten(2, 3)
    if state is None or state.context is None:
        return hidden, mask
    past_BNYD = state.context.to(hidden.dtype).unsqueeze(1).expand(-1, n_segments, -1, -1)
    past_mask_BNY = state.context_mask.cpu().unsqueeze(1).expand(-1, n_segments, -1)
    return torch.cat([past_BNYD, hidden], dim=2), torch.cat([past_mask_BNY, mask], dim=2)


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
