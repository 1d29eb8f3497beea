"""Models that studies compare with, built from a BART: full attention, and segments with an embedding of their number.

Shape suffixes: B documents, N segments, L tokens in a segment, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration

# number of rows of BART's position table before the row of position 0
BART_OFFSET = 2


def repeat_rows(table: Tensor, n_rows: int) -> Tensor:
    """Return a table of `n_rows` rows: the rows of `table`, repeated from the start as often as needed."""
    return table[torch.arange(n_rows, device=table.device) % len(table)]


@torch.no_grad()
def read_at_once(model: RecurrentBartForConditionalGeneration, n_tokens: int) -> RecurrentBartForConditionalGeneration:
    """Let a model read up to `n_tokens` tokens as one segment, with BART's positions repeated. Return the model."""
    model.config.segment_size = model.config.input_size = n_tokens
    positions = model.model.encoder.embed_positions
    offset, table = positions.weight.split((BART_OFFSET, positions.num_embeddings - BART_OFFSET))
    positions.weight = nn.Parameter(torch.cat([offset, repeat_rows(table, n_tokens)]))
    positions.num_embeddings = len(positions.weight)
    return model


class NumberedSegments(nn.Module):
    """Model that adds an embedding of the segment's number to the embeddings of its tokens.

    Without a state, this embedding alone tells the decoder in which order the segments stand.
    """

    def __init__(self, model: RecurrentBartForConditionalGeneration, n_segments: int):
        super().__init__()
        self.model = model
        # the optimizer gives a name with `recurrence.` the learning rate of new parameters
        self.recurrence = nn.Embedding(n_segments, model.config.d_model)
        nn.init.zeros_(self.recurrence.weight)

    @property
    def generation_config(self) -> GenerationConfig:
        """Generation settings of the model."""
        return self.model.generation_config

    def forward(self, input_ids: Tensor, **how: Any) -> Seq2SeqLMOutput:
        """Return loss and logits, as RecurrentBartForConditionalGeneration does."""
        return self.model(inputs_embeds=self._embed(input_ids), **how)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **how: Any) -> Tensor:
        """Return generated ids `(B, T)`."""
        encoded = self.model.get_encoder()(inputs_embeds=self._embed(input_ids), attention_mask=attention_mask)
        # the encoder's output holds its mask
        return self.model.generate(encoder_outputs=encoded, **how)

    def _embed(self, input_ids_BNL: Tensor) -> Tensor:
        numbers_N = torch.arange(input_ids_BNL.shape[1], device=input_ids_BNL.device)
        return self.model.get_input_embeddings()(input_ids_BNL) + self.recurrence(numbers_N)[:, None]
