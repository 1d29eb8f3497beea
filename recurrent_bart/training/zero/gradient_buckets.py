"""Reduction of ZeRO-3 gradients a bucket at a time, with the bits of DeepSpeed's own.

DeepSpeed slices, averages, converts and copies each of BART-large's 532 gradients for itself, while GPUs wait
(benchmarks/LOG.md).
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn.functional import pad

# prefix of DeepSpeed's private names in its ZeRO-3 optimizer
PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"


@torch.no_grad()
def average_and_scatter(optimizer: Any, parameters: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """Return this rank's part of the mean gradient of each parameter, as DeepSpeed's `__avg_scatter_grads` does.

    Args:
        optimizer: DeepSpeed's optimizer of ZeRO-3.
        parameters: Parameters of one bucket, with whole gradients.
        dtype: Data type in which they are exchanged and returned.

    Returns:
        `(ceil(n / n_processes),)` for a parameter of n entries; what is beyond them is 0.
    """
    group = optimizer._get_param_partition_group(parameters[0])
    n_processes, rank = deepspeed.comm.get_world_size(group), deepspeed.comm.get_rank(group)
    lengths = [-(-parameter.ds_numel // n_processes) for parameter in parameters]
    # a row for each process
    parts = [
        _fill(parameter.grad.to(dtype).reshape(-1), n_processes * length).view(n_processes, length)
        for parameter, length in zip(parameters, lengths, strict=True)
    ]
    rows = torch.cat(parts, dim=1).div_(n_processes)
    deepspeed.comm.reduce_scatter_fn(rows[rank], rows.view(-1), group=group, async_op=False)
    return list(rows[rank].split(lengths))


@torch.no_grad()
def keep_partitions(optimizer: Any, parameters: Sequence[Any], partitions: Sequence[Tensor]) -> list[Tensor]:
    """Add parts to those of earlier passes of the step and free whole gradients, as `partition_grads` does."""
    kept = getattr(optimizer, f"{PRIVATE}param_id_to_grad_partition")
    own = [
        kept[parameter.ds_id][: partition.numel()] for parameter, partition in zip(parameters, partitions, strict=True)
    ]
    if optimizer.micro_step_id == 0:
        torch._foreach_copy_(own, list(partitions))
    else:
        torch._foreach_add_(own, [partition.to(optimizer.gradient_accumulation_dtype) for partition in partitions])
    accelerator = get_accelerator()
    stream = None if accelerator.is_synchronized_device() else accelerator.current_stream()
    for parameter in parameters:
        if stream is not None:
            # it was made on another stream, which must not give its memory away before this one has read it
            parameter.grad.record_stream(stream)
        parameter.grad = None
    return own


def _fill(entries: Tensor, length: int) -> Tensor:
    return entries if len(entries) == length else pad(entries, (0, length - len(entries)))
