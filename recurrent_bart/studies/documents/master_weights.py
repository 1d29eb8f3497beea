"""Weights in bfloat16 to compute with, beside those in float32 that are trained, as DeepSpeed has them."""

import copy
from typing import Any

import torch
from torch import nn

from recurrent_bart.training.zero.gradient_sums import add_gradients


class MasterWeights:
    """A model's weights twice, or once where it computes in float32.

    Attributes:
        master: The model as it was given, whose parameters an optimizer changes.
        model: What computes and gets gradients; in float32 the same.

    Args:
        master: A model in float32.
        is_bf16: Compute in bfloat16.
    """

    def __init__(self, master: nn.Module, is_bf16: bool):
        self.master: Any = master
        self.model: Any = copy.deepcopy(master).bfloat16() if is_bf16 else master
        # tied weights are one parameter in both
        both = zip(self.model.parameters(), master.parameters(), strict=True)
        self._pairs = [(own, precise) for own, precise in both if own is not precise]
        # rounded at first, as DeepSpeed's are
        self._copy([precise for _, precise in self._pairs], [own for own, _ in self._pairs])

    def collect_gradients(self) -> None:
        """Add the gradients of a backward pass to those of the trained weights, in float32, and free them."""
        sums = add_gradients([precise.grad for _, precise in self._pairs], [own.grad for own, _ in self._pairs])
        for (own, precise), total in zip(self._pairs, sums, strict=True):
            own.grad, precise.grad = None, total

    def round(self) -> None:
        """Compute with the weights as they have been trained."""
        self._copy([own for own, _ in self._pairs], [precise for _, precise in self._pairs])

    @staticmethod
    @torch.no_grad()
    def _copy(into: list[Any], given: list[Any]) -> None:
        # some hundred weights in few kernels
        if into:
            torch._foreach_copy_(into, given)
