"""Master weights in float32 and a bfloat16 copy that runs the model, as in DeepSpeed."""

import copy
from typing import Any

import torch
from torch import nn

from recurrent_bart.training.zero.gradient_sums import add_gradients


class MasterWeights:
    """Pair of models with equal weights: the master in float32, and for bfloat16 compute a bfloat16 copy.

    Attributes:
        master: Float32 model whose parameters the optimizer updates.
        model: Model whose forward and backward passes run. With float32 compute, this is the master itself.
    """

    def __init__(self, master: nn.Module, is_bf16: bool):
        self.master: Any = master
        self.model: Any = copy.deepcopy(master).bfloat16() if is_bf16 else master
        # tied weights are one parameter in the master and one in the copy, so the pairs match
        both = zip(self.model.parameters(), master.parameters(), strict=True)
        self._pairs = [(own, precise) for own, precise in both if own is not precise]
        # the master weights start rounded to bfloat16, as in DeepSpeed
        self._copy([precise for _, precise in self._pairs], [own for own, _ in self._pairs])

    def collect_gradients(self) -> None:
        """Add the gradients of the bfloat16 copy to the master's gradients in float32. Free the copy's gradients."""
        sums = add_gradients([precise.grad for _, precise in self._pairs], [own.grad for own, _ in self._pairs])
        for (own, precise), total in zip(self._pairs, sums, strict=True):
            own.grad, precise.grad = None, total

    def round(self) -> None:
        """Copy the master weights to the bfloat16 copy, which rounds them."""
        self._copy([own for own, _ in self._pairs], [precise for _, precise in self._pairs])

    @staticmethod
    @torch.no_grad()
    def _copy(into: list[Any], given: list[Any]) -> None:
        # this function copies hundreds of weights with few kernel launches
        if into:
            torch._foreach_copy_(into, given)
