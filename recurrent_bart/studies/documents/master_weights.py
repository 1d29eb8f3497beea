"""Float32 master weights and a bfloat16 copy for compute, as in DeepSpeed."""

import copy
from typing import Any

import torch
from torch import nn

from recurrent_bart.training.zero.gradient_sums import add_gradients


class MasterWeights:
    """A model's weights in float32 and, for bfloat16 compute, in a second copy.

    Attributes:
        master: Float32 model whose parameters the optimizer updates.
        model: Model that computes and receives gradients; the master itself for float32 compute.
    """

    def __init__(self, master: nn.Module, is_bf16: bool):
        self.master: Any = master
        self.model: Any = copy.deepcopy(master).bfloat16() if is_bf16 else master
        # tied weights are one parameter in both models, so the pairs match
        both = zip(self.model.parameters(), master.parameters(), strict=True)
        self._pairs = [(own, precise) for own, precise in both if own is not precise]
        # DeepSpeed too starts from rounded master weights
        self._copy([precise for _, precise in self._pairs], [own for own, _ in self._pairs])

    def collect_gradients(self) -> None:
        """Add the copy's gradients to the master gradients in float32, and free them."""
        sums = add_gradients([precise.grad for _, precise in self._pairs], [own.grad for own, _ in self._pairs])
        for (own, precise), total in zip(self._pairs, sums, strict=True):
            own.grad, precise.grad = None, total

    def round(self) -> None:
        """Copy the master weights to the bfloat16 copy."""
        self._copy([own for own, _ in self._pairs], [precise for _, precise in self._pairs])

    @staticmethod
    @torch.no_grad()
    def _copy(into: list[Any], given: list[Any]) -> None:
        # few kernel launches for some hundred weights
        if into:
            torch._foreach_copy_(into, given)
