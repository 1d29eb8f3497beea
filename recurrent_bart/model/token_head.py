"""Output layer that computes vocabulary scores, or the loss without all scores in memory at once.

Shape suffixes: M target positions, C positions of a chunk, T target length, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recurrent_bart.model.loss import IGNORED, summed_loss

# scores in memory at a time: 100 MB in float32, 512 positions with BART's vocabulary
CHUNK_SCORES = 512 * 50_265
# a subclass, for example a quantized weight, may not support the chunked product
PLAIN_WEIGHTS = (Tensor, nn.Parameter)


class TokenHead(nn.Linear):
    """Linear layer that returns the loss if labels are given.

    ZeRO-3 gathers the weight by hooks on this module, so the loss must be computed inside it.
    """

    @classmethod
    def of(cls, plain: nn.Linear) -> "TokenHead":
        """Turn a plain layer into a head in place: the same module still counts as initialized."""
        plain.__class__ = cls
        assert isinstance(plain, cls)
        return plain

    def forward(
        self,
        hidden: Tensor,
        labels_BT: Tensor | None = None,
        bias_1V: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Return scores `(..., V)`, or with labels the cross-entropy summed over targets, in float32 at least.

        A quantized or sharded weight computes all scores at once, because the chunked product needs a plain weight.
        `bias_1V` is added to the scores in the loss and gets no gradient. `smoothing` is the share of each target
        that is spread over the vocabulary.
        """
        if labels_BT is None:
            return super().forward(hidden)
        if self.bias is not None or type(self.weight) not in PLAIN_WEIGHTS:
            scores = super().forward(hidden) if bias_1V is None else super().forward(hidden) + bias_1V
            return summed_loss(scores, labels_BT, smoothing)
        with torch.autocast(hidden.device.type, enabled=False):
            return _ChunkedLoss.apply(hidden.flatten(0, -2), self.weight, bias_1V, labels_BT.flatten(), smoothing)


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy that computes scores chunk by chunk, and recomputes the scores in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_1V: Tensor, labels_M: Tensor, smoothing: float
    ) -> Tensor:
        ctx.smoothing = smoothing
        total = hidden_MD.new_zeros((), dtype=_precise(hidden_MD))
        normalisers = []
        for hidden_CD, labels_C in _chunks(len(weight_VD), hidden_MD, labels_M):
            scores_CV = _scores(hidden_CD, weight_VD, bias_1V)
            normalisers.append(scores_CV.logsumexp(dim=-1))
            own_C = scores_CV.gather(1, labels_C.clamp(min=0).unsqueeze(1)).squeeze(1)
            if smoothing:
                own_C = torch.lerp(own_C, scores_CV.mean(dim=-1), smoothing)
            total += (normalisers[-1] - own_C).masked_fill(labels_C == IGNORED, 0.0).sum()
        ctx.save_for_backward(hidden_MD, weight_VD, bias_1V, labels_M, torch.cat(normalisers))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_1V, labels_M, normaliser_M = ctx.saved_tensors
        by_hidden, by_weight = [], None
        for hidden_CD, labels_C, normaliser_C in _chunks(len(weight_VD), hidden_MD, labels_M, normaliser_M):
            scores_CV = _scores(hidden_CD, weight_VD, bias_1V)
            by_score_CV = scores_CV.sub_(normaliser_C.unsqueeze(1)).exp_()
            # gradient of cross-entropy: probabilities, minus one at the target; smoothing spreads a share of the one
            own_C1 = labels_C.clamp(min=0).unsqueeze(1)
            share = 1 - ctx.smoothing
            by_score_CV.scatter_add_(1, own_C1, torch.full_like(own_C1, -share, dtype=by_score_CV.dtype))
            if ctx.smoothing:
                by_score_CV -= ctx.smoothing / len(weight_VD)
            by_score_CV *= torch.where(labels_C == IGNORED, 0.0, gradients[0]).unsqueeze(1)
            by_score_CV = by_score_CV.to(hidden_MD.dtype)
            by_hidden.append(by_score_CV @ weight_VD)
            if ctx.needs_input_grad[1]:
                part_VD = by_score_CV.mT @ hidden_CD
                # sum in float32, because there may be many chunks
                by_weight = part_VD.to(_precise(part_VD)) if by_weight is None else by_weight.add_(part_VD)
        return torch.cat(by_hidden), None if by_weight is None else by_weight.to(weight_VD.dtype), None, None, None


def _chunks(vocab_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(max(1, CHUNK_SCORES // vocab_size)) for tensor in tensors), strict=True)


def _scores(hidden_CD: Tensor, weight_VD: Tensor, bias_1V: Tensor) -> Tensor:
    scores_CV = hidden_CD @ weight_VD.mT + bias_1V
    return scores_CV.to(_precise(scores_CV))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
