"""Optimizer settings that a resumed run takes from its flags and not from the checkpoint."""

import contextlib
from collections.abc import Iterator

from deepspeed import DeepSpeedEngine


@contextlib.contextmanager
def keep_given_settings(engine: DeepSpeedEngine) -> Iterator[None]:
    """Keep the flags' clipping, weight decay, betas and peak learning rates while a checkpoint is loaded in this block.

    DeepSpeed overwrites these settings with the checkpoint's values. Its universal format keeps the values of only one
    parameter group.
    """
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    clip, base_rates = optimizer.clip_grad, scheduler and scheduler.base_lrs
    given = [
        {name: group[name] for name in ("weight_decay", "betas") if name in group} for group in optimizer.param_groups
    ]
    yield
    optimizer.clip_grad = clip
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        group.update(settings)
    if scheduler:
        scheduler.base_lrs = base_rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(optimizer.param_groups, base_rates, factors, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor
