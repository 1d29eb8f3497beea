"""Training engine of one process in plain PyTorch, with master weights in float32 as in DeepSpeed."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from recurrent_bart.training.zero.float32_sums import add_gradients


class SingleProcessEngine:
    """Engine with the methods of a DeepSpeed engine that `Trainer.train_step` calls. No method waits for the device.

    Attributes:
        master: Float32 model whose parameters the scheduler's optimizer updates.
        module: Model whose forward and backward passes run: a bfloat16 copy of the master, or the master itself.
    """

    def __init__(self, master: nn.Module, scheduler: LRScheduler, max_grad_norm: float, is_bf16: bool):
        self.master, self.scheduler, self.max_grad_norm = master, scheduler, max_grad_norm
        self.device = next(master.parameters()).device
        self.module: Any = copy.deepcopy(master).bfloat16() if is_bf16 else master
        # tied weights are one parameter in the master and one in the copy, so the pairs match
        both = zip(self.module.parameters(), master.parameters(), strict=True)
        self._pairs = [(own, precise) for own, precise in both if own is not precise]
        # the master weights start rounded to bfloat16, as in DeepSpeed
        self._copy([precise for _, precise in self._pairs], [own for own, _ in self._pairs])

    def backward(self, loss: Tensor) -> None:
        """Run a backward pass. Move the gradients of the bfloat16 copy to the master, which sums them in float32."""
        loss.backward()
        sums = add_gradients([precise.grad for _, precise in self._pairs], [own.grad for own, _ in self._pairs])
        for (own, precise), total in zip(self._pairs, sums, strict=True):
            own.grad, precise.grad = None, total

    def step(self) -> None:
        """Clip the gradients, update the master weights, and copy them to the bfloat16 copy, which rounds them."""
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.master.parameters(), self.max_grad_norm)
        self.scheduler.optimizer.step()
        self.scheduler.optimizer.zero_grad()
        self._copy([own for own, _ in self._pairs], [precise for _, precise in self._pairs])
        self.scheduler.step()

    def was_step_applied(self) -> bool:
        """Return True: a step whose gradients are not finite is applied too."""
        return True

    @staticmethod
    @torch.no_grad()
    def _copy(into: list[Any], given: list[Any]) -> None:
        # this function copies hundreds of weights with few kernel launches
        if into:
            torch._foreach_copy_(into, given)
