"""Useful FLOPs of models other than Recurrent BART: matrix products over visible positions, as in `model/flops.py`."""

from dataclasses import dataclass

import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.flops import Arithmetic


@dataclass(frozen=True)
class Attention:
    """Attention pattern of a model's encoder.

    Attributes:
        n_near: Number of neighbours that each token attends to. None: each token attends to all positions.
        n_for_all: Number of global positions (LED). A global position attends to all tokens, and all tokens attend to
            the global position. Global attention has separate projections.
        n_per_summary: Number of tokens per summary position (LongT5). Every token attends to all summary positions.
            None: there are no summary positions.
    """

    n_near: int | None = None
    n_for_all: int = 0
    n_per_summary: int | None = None

    def pairs(self, n_tokens: int) -> float:
        """Return the number of query-key pairs."""
        near = n_tokens if self.n_near is None else min(n_tokens, self.n_near)
        return n_tokens * (near + 2 * self.n_for_all + self._n_summaries(n_tokens))

    def weights(self, n_tokens: int, width: int) -> float:
        """Return the FLOPs of projections that full attention does not have."""
        keys_and_values = self._n_summaries(n_tokens) + (n_tokens if self.n_for_all else 0)
        return 4 * width**2 * keys_and_values + 2 * width**2 * self.n_for_all

    def _n_summaries(self, n_tokens: int) -> float:
        return n_tokens / self.n_per_summary if self.n_per_summary else 0.0


@dataclass(frozen=True)
class PeerArithmetic:
    """FLOP counter of a model without recurrence that has BART's shape and the encoder attention `attention`."""

    shape: RecurrentBartConfig
    attention: Attention

    def encoder(self, n_tokens: int) -> float:
        """Return the FLOPs of an encoder forward pass over `n_tokens` tokens."""
        width = self.shape.d_model
        weights = 8 * width**2 + 4 * width * self.shape.encoder_ffn_dim
        attended = 4 * width * self.attention.pairs(n_tokens)
        layer = weights * n_tokens + attended + self.attention.weights(n_tokens, width)
        return self.shape.encoder_layers * layer

    def decoder(self, n_targets: int, n_context: int) -> float:
        """Return the FLOPs of a decoder forward pass over a target that attends to `n_context` positions."""
        return Arithmetic(self.shape).decoder(torch.tensor([n_targets]), torch.tensor([n_context]))
