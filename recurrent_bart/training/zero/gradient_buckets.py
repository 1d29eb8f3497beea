"""Reduction of ZeRO-3 gradients per bucket, bitwise equal to DeepSpeed's reduction.

DeepSpeed slices, averages, converts and copies each of BART-large's 532 gradients separately, while the GPU waits
(benchmarks/LOG.md).
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn.functional import pad

# prefix of private names in DeepSpeed's ZeRO-3 optimizer
PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"


@torch.no_grad()
def average_and_scatter(optimizer: Any, parameters: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """Return this rank's partition of each parameter's mean gradient, as `__avg_scatter_grads` of DeepSpeed does.

    Args:
        optimizer: DeepSpeed's ZeRO-3 optimizer.
        parameters: Parameters of one bucket, with unsharded gradients.
        dtype: Data type in which gradients are exchanged and returned.

    Returns:
        One tensor `(ceil(n / n_processes),)` for each parameter of n elements, padded with 0.
    """
    group = optimizer._get_param_partition_group(parameters[0])
    n_processes, rank = deepspeed.comm.get_world_size(group), deepspeed.comm.get_rank(group)
    lengths = [-(-parameter.ds_numel // n_processes) for parameter in parameters]
    # one row per rank
    parts = [
        _fill(parameter.grad.to(dtype).reshape(-1), n_processes * length).view(n_processes, length)
        for parameter, length in zip(parameters, lengths, strict=True)
    ]
    rows = torch.cat(parts, dim=1).div_(n_processes)
    deepspeed.comm.reduce_scatter_fn(rows[rank], rows.view(-1), group=group, async_op=False)
    return list(rows[rank].split(lengths))


@torch.no_grad()
def keep_partitions(optimizer: Any, parameters: Sequence[Any], partitions: Sequence[Tensor]) -> list[Tensor]:
    """Add partitions to the sums of earlier passes, and free the unsharded gradients, as `partition_grads` does."""
    sums = getattr(optimizer, f"{PRIVATE}param_id_to_grad_partition")
    own = [
        sums[parameter.ds_id][: partition.numel()] for parameter, partition in zip(parameters, partitions, strict=True)
    ]
    if optimizer.micro_step_id == 0:
        torch._foreach_copy_(own, list(partitions))
    else:
        torch._foreach_add_(own, [partition.to(optimizer.gradient_accumulation_dtype) for partition in partitions])
    accelerator = get_accelerator()
    stream = None if accelerator.is_synchronized_device() else accelerator.current_stream()
    for parameter in parameters:
        if stream is not None:
            # the gradient was allocated on another CUDA stream, which must not reuse the memory before this stream has
            # read it
            parameter.grad.record_stream(stream)
        parameter.grad = None
    return own


def _fill(entries: Tensor, length: int) -> Tensor:
    return entries if len(entries) == length else pad(entries, (0, length - len(entries)))
