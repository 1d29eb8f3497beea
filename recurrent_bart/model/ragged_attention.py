"""Cross-attention to contexts of different lengths, concatenated without padding, by flash attention.

Attention with a mask is slow: on an H200, the backward pass for 16 articles of 6,144 positions took 7.8 ms a layer.

Shape suffixes: M contexts, A positions of all contexts, R queries of all contexts, T target length, H heads,
K head width, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.recurrence.segmentation import is_traced, to_device

# positions of all contexts, padding included. Below it, the decoder's CUDA graphs save more than the mask costs: the
# mask costs about 0.1 ms a layer for 1,024 positions, launching the kernels of a layer about 2 ms. Between 8,192 and
# 65,536 positions nothing was measured
LEAST_POSITIONS = 20_480
# flash attention's backward pass supports wider heads on a few GPUs only
MOST_HEAD_WIDTH = 128


@dataclass(frozen=True)
class RaggedContexts:
    """Layout of contexts that are concatenated without padding.

    Attributes:
        starts: `(M + 1,)` 32-bit integers on the device: the first position of each context, and the end of the last.
        longest: Length of the longest context.
    """

    starts: Tensor
    longest: int

    @classmethod
    def of_lengths(cls, lengths_M: Tensor, device: torch.device) -> "RaggedContexts":
        """Build the layout of contexts with these lengths, which are on the CPU."""
        starts = torch.nn.functional.pad(lengths_M.cumsum(0), (1, 0)).int()
        return cls(to_device(starts, device), int(lengths_M.max()))

    def attend(self, query_MHTK: Tensor, key_value_1HAK: Sequence[Tensor], dropout: float) -> Tensor:
        """Return what each context's queries read, `(M, T, H, K)`. The scale is `K ** -0.5`."""
        n_rows, _, n_queries, _ = query_MHTK.shape
        query = query_MHTK.transpose(1, 2).flatten(0, 1)
        key, value = (part.squeeze(0).transpose(0, 1) for part in key_value_1HAK)
        first = n_queries * torch.arange(n_rows + 1, dtype=torch.int32, device=query.device)
        # layers may be on several devices
        starts = self.starts.to(query.device)
        read = flash_attention(query, key, value, first, starts, n_queries, self.longest, dropout)
        return read.unflatten(0, (n_rows, n_queries))


def flash_attention(
    query_RHK: Tensor,
    key_AHK: Tensor,
    value_AHK: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
) -> Tensor:
    """Return what each sequence's queries read from its keys and values; sequences are concatenated, without padding.

    PyTorch's `varlen_attn` is the same without dropout.
    """
    # not causal; the probabilities are not returned
    settings = most_queries, most_keys, dropout, False, False
    tensors = query_RHK, key_AHK, value_AHK, query_starts, key_starts
    read: Tensor = torch.ops.aten._flash_attention_forward(*tensors, *settings)[0]
    return read


def ragged_contexts(
    config: RecurrentBartConfig, outputs: RecurrentEncoderOutput
) -> tuple[Tensor, RaggedContexts] | None:
    """Return the contexts without padding, `(1, A, D)`, and their layout; None: padded contexts are not slower."""
    hidden, mask = outputs.last_hidden_state, outputs.host_mask
    if mask is None or mask.numel() < LEAST_POSITIONS or not has_flash_attention(config, hidden):
        return None
    if (
        hidden.dim() != 3
        or outputs.context_mask is None
        or not mask.shape == hidden.shape[:2] == outputs.context_mask.shape
    ):
        # a caller has changed the outputs
        return None
    if outputs.packing is None:
        lengths_M = mask.sum(dim=1)
    else:
        lengths_M = torch.cat([part.squeeze(0).sum(dim=1) for part in outputs.packing.unpack(mask, dim=1)])
    index_A = to_device(mask.flatten().nonzero().squeeze(1), hidden.device)
    selected: Tensor = _Select.apply(hidden.flatten(0, 1), index_A)
    return selected.unsqueeze(0), RaggedContexts.of_lengths(lengths_M, hidden.device)


def has_flash_attention(config: RecurrentBartConfig, hidden: Tensor) -> bool:
    """Return True if PyTorch's flash attention can read contexts of the type and on the device of `hidden`."""
    width = config.d_model // config.decoder_attention_heads
    return (
        hidden.is_cuda
        and torch.version.hip is None
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and config._attn_implementation == "sdpa"
        # gated attention has two softmaxes
        and not (config.has_state and config.prefix_attention == "gated")
        and width % 8 == 0
        and width <= MOST_HEAD_WIDTH
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.backends.cuda.flash_sdp_enabled()
        and (config.attention_dropout == 0 or not _is_flash_replaced())
        and not torch.is_autocast_enabled("cuda")
        and not is_traced()
        and not torch.cuda.is_current_stream_capturing()
    )


def _is_flash_replaced() -> bool:
    """Return True if `torch.nn.attention` runs another flash attention; versions 3 and 4 have no dropout."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() is not None


class _Select(torch.autograd.Function):
    """`index_select` of different rows; its own backward pass would add rows, which is slower than copying them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.n_rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None
