"""Encoding of documents with the states of other documents: shows what the content of a state is worth.

Shape suffixes: B documents, N segments, L tokens in a segment.
"""

from dataclasses import replace

import torch
from torch import Tensor

from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState


@torch.no_grad()
def encode_with_foreign_states(
    model: RecurrentBartForConditionalGeneration, ids_BNL: Tensor, mask_BNL: Tensor
) -> RecurrentEncoderOutput:
    """Encode documents; each segment reads the state that the previous document of the batch has at this place.

    The state still tells how many segments were read, but holds nothing about the document. The decoder's tokens stay
    the document's own, and so does the state that its last segment writes.

    Raises:
        ValueError: The batch has one document, or fewer documents than segments, or the model carries no state.
    """
    n_documents, n_segments = ids_BNL.shape[:2]
    if n_documents < max(2, n_segments):
        raise ValueError(
            f"{n_documents} documents of {n_segments} segments: a document would read its own state; at least "
            f"{max(2, n_segments)} documents are needed"
        )
    if not model.config.has_state:
        raise ValueError("the model carries no state")
    state = RecurrentState.unread(model.config, len(ids_BNL), ids_BNL.device)
    for ids_BL, mask_BL in zip(ids_BNL.unbind(1), mask_BNL.unbind(1), strict=True):
        output = model.model.encode(ids_BL[:, None], mask_BL[:, None], state=state)
        state = replace(output.state, memory=output.state.memory.roll(1, dims=0))
    return output
