"""Recurrent Memory Transformer (RMT) on Hugging Face's BART, computed as in public implementations.

Memory embeddings precede a segment's embeddings. The encoder outputs at memory positions are the next segment's memory
(Bulatov et al., NeurIPS 2022, arXiv 2207.06881). Hugging Face's encoder is called segment after segment.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, P memory length, D model width.
"""

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from recurrent_bart.benchmarks.models.fused_decoder import decoder_loss


class RecurrentMemoryBart(nn.Module):
    """BART that reads segments and carries the outputs of its `n_memory` memory positions.

    BART's position table must have room for the memory and one segment. The gradient crosses the last `bptt_depth`
    segment boundaries (-1: all). Earlier segments have no autograd graph.
    """

    def __init__(self, config: BartConfig, n_memory: int, bptt_depth: int = -1):
        super().__init__()
        self.bart = BartForConditionalGeneration(config)
        self.memory = nn.Parameter(torch.randn(n_memory, config.d_model) * config.init_std)
        self.bptt_depth = bptt_depth

    def forward(self, input_ids_BNL: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the loss of one target per document."""
        return decoder_loss(self.bart, self.encode(input_ids_BNL), labels_BT)

    def encode(self, input_ids_BNL: Tensor) -> Tensor:
        """Return the encoder output of the last segment, memory positions first, `(B, P + L, D)`."""
        encoder = self.bart.get_encoder()
        n_beyond = 0 if self.bptt_depth == -1 else input_ids_BNL.shape[1] - self.bptt_depth - 1
        memory_BPD = self.memory.expand(len(input_ids_BNL), -1, -1)
        for number, segment_BL in enumerate(input_ids_BNL.unbind(1)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= n_beyond):
                embeddings = torch.cat([memory_BPD, encoder.embed_tokens(segment_BL)], dim=1)
                read = encoder(inputs_embeds=embeddings).last_hidden_state
                memory_BPD = read[:, : len(self.memory)]
        return read
