"""What this run's flags say and a checkpoint would silently overrule with those of the time it was written."""

import contextlib
from collections.abc import Iterator

from deepspeed import DeepSpeedEngine


@contextlib.contextmanager
def keep_given_settings(engine: DeepSpeedEngine) -> Iterator[None]:
    """While a checkpoint is loaded: clipping, weight decay, betas and highest learning rates are this run's afterwards.

    DeepSpeed's universal format has those of one group of parameters for all of them.
    """
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    clip, base_rates = optimizer.clip_grad, scheduler and scheduler.base_lrs
    kept = [
        {name: group[name] for name in ("weight_decay", "betas") if name in group} for group in optimizer.param_groups
    ]
    yield
    optimizer.clip_grad = clip
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)
    if scheduler:
        scheduler.base_lrs = base_rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(optimizer.param_groups, base_rates, factors, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor
