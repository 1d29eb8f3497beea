"""Hugging Face's BART whose decoder attends to several segments at once: SegEnc, and BART with full attention.

SegEnc and SLED encode the segments of a document independently, as rows of one batch. The decoder attends to all
tokens (Vig et al., arXiv 2112.07637; Ivgi et al., arXiv 2208.00748). Neither carries a state.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, A attended length, D model width.
"""

import torch
from torch import Tensor
from transformers import BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput


def encode_segments(bart: BartForConditionalGeneration, input_ids_BNL: Tensor) -> Tensor:
    """Return the encoder outputs of all segments, one after the other in each document, `(B, N * L, D)`."""
    read = bart.get_encoder()(input_ids_BNL.flatten(0, 1)).last_hidden_state
    return read.view(len(input_ids_BNL), -1, read.shape[-1])


def decoder_loss(bart: BartForConditionalGeneration, context_BAD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the loss of one target per document, which attends to `context_BAD`.

    The causal mask is given: Hugging Face's decoder would build one, and wait for the GPU to read the mask's values.
    """
    n_targets = labels_BT.shape[1]
    mask_TT = torch.full((n_targets, n_targets), float("-inf"), dtype=context_BAD.dtype, device=context_BAD.device)
    return bart(
        encoder_outputs=BaseModelOutput(last_hidden_state=context_BAD),
        decoder_attention_mask=mask_TT.triu(1).expand(len(labels_BT), 1, -1, -1),
        labels=labels_BT,
        use_cache=False,
    ).loss
