"""Optimizer and learning rate scheduler."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.run_arguments import RunArguments

# name suffixes of parameters that stack one vector per layer
STACKED_VECTORS = ("_bias", "prefix_gate", "matrix_gate")


def is_adapter(name: str) -> bool:
    """Return True if a parameter with this name belongs to a low-rank adapter."""
    return ".lora_" in name


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates of BART's parameters and of the recurrence's parameters.

    The rates may be tensors on the parameters' device, so that a captured CUDA graph can read changed values.
    """

    backbone: float | Tensor
    recurrence: float | Tensor

    @classmethod
    def of(cls, run: RunArguments, is_pretrained: bool, d_model: int) -> "LearningRates":
        """Return the learning rates from the flags, or their defaults.

        For a pretrained model, the default learning rate of the recurrence is 10 times BART's learning rate, because
        the recurrence is not pretrained.
        """
        backbone, recurrence = run.learning_rate, run.recurrence_learning_rate
        if backbone is None:
            backbone = 3e-5 if is_pretrained else 3e-3 * 128 / d_model
        if recurrence is None:
            recurrence = backbone * (10 if is_pretrained else 1)
        return cls(backbone, recurrence)


def build_optimizer(
    model: nn.Module, rates: LearningRates, weight_decay: float, adam_beta2: float = 0.999
) -> Optimizer:
    """Build AdamW over the trained parameters. Weight decay applies only to matrices.

    The parameter groups depend only on parameter names and shapes, so a checkpoint also fits an optimizer with other
    learning rates or another weight decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # adapters are new parameters too and get the recurrence's learning rate
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
        # one fused kernel over DeepSpeed's flattened parameters; the default allocates as much temporary memory in each
        # operation
        fused=True,
        capturable=torch.is_tensor(rates.backbone),
    )


def build_scheduler(optimizer: Optimizer, run: RunArguments) -> LambdaLR:
    """Build the scheduler: a linear warm-up, then the decay of transformers that `--lr_scheduler` names."""
    return LambdaLR(optimizer, learning_rate_factor(run.lr_scheduler, run.warmup_steps or 0, run.max_steps))


def learning_rate_factor(schedule: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """Return a function that maps a step (counted from 0) to a share (0 to 1) of the peak learning rate."""
    # all schedules of this package have a warm-up
    name = "constant_with_warmup" if schedule == "constant" else schedule
    # transformers' share is 0 at step 0, so the first step here is its step 1
    unused = SGD([torch.zeros(())])
    share = get_scheduler(name, unused, warmup_steps + 1, max_steps + 1).lr_lambdas[0]
    return lambda step: share(min(step, max_steps) + 1)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Return True for a matrix or a stack of matrices, False for biases, norm weights and gates of attention heads.

    The recurrence stacks the parameters of all layers in a first dimension, so a stack of vectors has as many
    dimensions as a matrix. A stack of vectors is recognised by its name.
    """
    return parameter.dim() > 1 and not name.endswith(STACKED_VECTORS)
