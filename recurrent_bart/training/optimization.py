"""The optimizer and its learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recurrent_bart.loading import is_recurrence
from recurrent_bart.training.arguments import RunArguments


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, is a low-rank adapter's."""
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
    """AdamW with decay on matrices alone; `adam_beta2`: of the mean of squared gradients, what a step keeps."""
    groups: dict[tuple[float | Tensor, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # adapters are as new as the recurrence
            rate = rates.recurrence if is_recurrence(name) or is_adapter(name) else rates.backbone
            groups.setdefault((rate, weight_decay if _is_decayed(name, parameter) else 0.0), []).append(parameter)
    return AdamW(
        [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()],
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


def _is_decayed(name: str, parameter: torch.Tensor) -> bool:
    # stacked by layer, the recurrence's biases and gates have a dimension more than a vector
    is_vector = parameter.dim() < 2 or name.endswith(("_bias", "prefix_gate"))
    return not is_vector and "layernorm" not in name and "layer_norm" not in name
