"""Useful arithmetic of the other models: as `monitoring/flops.py` counts ours, products over what attention can see."""

from dataclasses import dataclass

import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.flops import Arithmetic


@dataclass(frozen=True)
class Attention:
    """What a model's encoder attends to beside a full square.

    Attributes:
        n_near: Positions around it that each token sees; None: all.
        n_for_all: Positions that every token sees and that see every token; their products with all have weights of
            their own (LED).
        n_per_summary: Tokens that one position stands for that every token sees (LongT5); None: there is none.
    """

    n_near: int | None = None
    n_for_all: int = 0
    n_per_summary: int | None = None

    def pairs(self, n_tokens: int) -> float:
        """Pairs of positions whose product is taken."""
        near = n_tokens if self.n_near is None else min(n_tokens, self.n_near)
        return n_tokens * (near + 2 * self.n_for_all + self._n_summaries(n_tokens))

    def weights(self, n_tokens: int, width: int) -> float:
        """Operations of projections that plain attention does not have."""
        keys_and_values = self._n_summaries(n_tokens) + (n_tokens if self.n_for_all else 0)
        return 4 * width**2 * keys_and_values + 2 * width**2 * self.n_for_all

    def _n_summaries(self, n_tokens: int) -> float:
        return n_tokens / self.n_per_summary if self.n_per_summary else 0.0


@dataclass(frozen=True)
class PeerArithmetic:
    """Counts a model of BART's shape.

    Attributes:
        shape: Its layers and widths; nothing of the recurrence is used.
        attention: Of its encoder.
    """

    shape: RecurrentBartConfig
    attention: Attention

    def encoder(self, n_tokens: int) -> float:
        """Operations of a forward pass over so many tokens."""
        width = self.shape.d_model
        weights = 8 * width**2 + 4 * width * self.shape.encoder_ffn_dim
        attended = 4 * width * self.attention.pairs(n_tokens)
        layer = weights * n_tokens + attended + self.attention.weights(n_tokens, width)
        return self.shape.encoder_layers * layer

    def decoder(self, n_targets: int, n_context: int) -> float:
        """Operations of a forward pass over a target that attends to so many positions."""
        return Arithmetic(self.shape).decoder(torch.tensor([n_targets]), torch.tensor([n_context]))
