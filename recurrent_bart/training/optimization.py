"""The optimizer and its learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.arguments import RunArguments

# ends of the names of parameters that hold one vector a layer
STACKED_VECTORS = ("_bias", "prefix_gate", "matrix_gate")


def is_adapter(name: str) -> bool:
    """Return True if a parameter with this name belongs to a low-rank adapter."""
    return ".lora_" in name


@dataclass(frozen=True)
class LearningRates:
    """Highest learning rates of BART's own parameters and of the recurrence's.

    They may be tensors on the parameters' device, to be changed there where steps are recorded.
    """

    backbone: float | Tensor
    recurrence: float | Tensor

    @classmethod
    def of(cls, run: RunArguments, is_pretrained: bool, d_model: int) -> "LearningRates":
        """Those given, or what suits the model: new parameters of a pretrained one have further to go."""
        backbone, recurrence = run.learning_rate, run.recurrence_learning_rate
        if backbone is None:
            backbone = 3e-5 if is_pretrained else 3e-3 * 128 / d_model
        if recurrence is None:
            recurrence = backbone * (10 if is_pretrained else 1)
        return cls(backbone, recurrence)


def build_optimizer(
    model: nn.Module, rates: LearningRates, weight_decay: float, adam_beta2: float = 0.999
) -> Optimizer:
    """Build AdamW over the trained parameters, in groups by kind.

    The groups depend on names and shapes alone. A checkpoint therefore fits an optimizer with other learning rates or
    another weight decay, even where two groups then have the same values.

    Args:
        model: Its trained parameters are optimized.
        rates: Learning rate of each kind.
        weight_decay: Decay of matrices; all other parameters have none.
        adam_beta2: Share of the mean of squared gradients that a step keeps.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # adapters are as new as the recurrence
            is_new = is_recurrence(name) or is_adapter(name)
            groups.setdefault((is_new, is_matrix(name, parameter)), []).append(parameter)
    return AdamW(
        [
            {
                "params": members,
                "lr": rates.recurrence if is_new else rates.backbone,
                "weight_decay": weight_decay if is_decayed else 0.0,
            }
            for (is_new, is_decayed), members in groups.items()
        ],
        betas=(0.9, adam_beta2),
        # one kernel over DeepSpeed's flat partition, instead of a temporary of its size for each operation
        fused=True,
        capturable=torch.is_tensor(rates.backbone),
    )


def build_scheduler(optimizer: Optimizer, run: RunArguments) -> LambdaLR:
    """Linear warm-up, then the decay that `--lr_scheduler` names, to 0 at `--max_steps`."""
    return LambdaLR(optimizer, learning_rate_factor(run.lr_scheduler, run.warmup_steps or 0, run.max_steps))


def learning_rate_factor(schedule: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Share of the highest learning rate at a step counted from 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "constant": 1.0,
        }[schedule]

    return factor


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return True for a matrix or a stack of matrices, False for a bias, a norm's weight or a gate of attention heads.

    The recurrence stacks the parameters of all layers in a first dimension. A stack of vectors has two dimensions or
    more, so it is known by its name.
    """
    return parameter.dim() > 1 and not name.endswith(STACKED_VECTORS)
