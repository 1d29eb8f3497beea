"""Gradient norms of BART's parameters and of the recurrence's parameters."""

import math
from collections.abc import Iterator

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from recurrent_bart.model.loading import is_recurrence


class GradientNorms:
    """Squared gradient norms of this rank's partition, for backbone and recurrence.

    The sum of these squares over ranks is the square of the whole gradient's norm, because ZeRO keeps each gradient
    element on one rank. DeepSpeed's norm over all parameters is computed from the same numbers.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self.optimizer = engine.optimizer
        self.is_recurrence = {id(p): is_recurrence(name) for name, p in engine.module.named_parameters()}

    @torch.no_grad()
    def squares(self) -> tuple[float, float]:
        """Return the squared gradient norms of backbone and recurrence.

        Call this method between the last backward pass of a step and its update. Both norms are NaN if the optimizer
        keeps no gradients of single parameters (ZeRO-1 with `grad_accum_dtype`).
        """
        if not hasattr(self.optimizer, "averaged_gradients"):
            return math.nan, math.nan
        parts: dict[bool, list[Tensor]] = {False: [], True: []}
        for parameter, norm in self._norms():
            parts[self.is_recurrence[id(parameter)]].append(norm)
        backbone, recurrence = (_square(parts[is_recurrence]) for is_recurrence in (False, True))
        return backbone, recurrence

    def _norms(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        optimizer = self.optimizer
        # ZeRO-1 and ZeRO-2 use another name for their groups than ZeRO-3
        groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
        for number, parameters in enumerate(groups):
            if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
                # with offload, gradients are in CPU memory, and DeepSpeed has stored their norms
                stored_norms = optimizer.norm_for_param_grads
                found = [(p, stored_norms.get(optimizer.get_param_id(p))) for p in parameters]
                yield from ((p, torch.as_tensor(norm)) for p, norm in found if norm is not None)
            elif parameters:
                gradients = [g for g in optimizer.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
                yield from zip(parameters, torch._foreach_norm(gradients), strict=False)


def _square(norms: list[Tensor]) -> float:
    return float(torch.stack([norm.double() for norm in norms]).square().sum()) if norms else 0.0
