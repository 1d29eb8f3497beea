"""Reduction of ZeRO-3 gradients per bucket, bitwise equal to DeepSpeed's reduction.

DeepSpeed slices, averages, converts and copies each of BART-large's 519 gradients separately, while the GPU waits
(benchmarks/LOG.md).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from recurrent_bart.training.zero.gradient_exchange import has_offload

# prefix of private names in DeepSpeed's ZeRO-3 optimizer
PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"


def can_reduce_buckets(optimizer: Any) -> bool:
    """Return True if the gradients stay on the GPU and are reduced as usual, by scattering their sums over ranks."""
    is_other = optimizer.zenflow or optimizer.all2all_process_group is not None or optimizer.enable_sanity_checks
    return optimizer.reduce_scatter and not (has_offload(optimizer) or is_other)


def add_to_bucket(optimizer: Any, parameter: Any) -> None:
    """Add a gradient to the bucket of its data type. Reduce the bucket first if the gradient does not fit into it."""
    dtype = optimizer.get_param_comm_dtype(parameter)
    bucket = optimizer.ipg_buckets[dtype]
    if bucket.elements and bucket.elements + parameter.ds_numel > optimizer.reduce_bucket_size:
        reduce_bucket(optimizer, dtype)
    if getattr(parameter, "ds_grad_is_ready", True):
        bucket.params.append(parameter)
        bucket.elements += parameter.ds_numel


@torch.no_grad()
def reduce_bucket(optimizer: Any, dtype: torch.dtype) -> None:
    """Average the gradients of a bucket over ranks. Add this rank's partitions to the sums, and free the gradients.

    Args:
        optimizer: DeepSpeed's ZeRO-3 optimizer.
        dtype: Data type in which the gradients of the bucket are exchanged.

    Raises:
        RuntimeError: A gradient has another number of elements than its parameter, or is in the bucket twice.
    """
    bucket = optimizer.ipg_buckets[dtype]
    parameters = sorted(bucket.params, key=lambda parameter: parameter.ds_id)
    bucket.clear_params()
    bucket.elements = 0
    if not parameters:
        return
    if len({parameter.ds_id for parameter in parameters}) < len(parameters):
        raise RuntimeError("a gradient was added twice to a bucket: it has changed before it was reduced")
    group = optimizer._get_param_partition_group(parameters[0])
    # packed by the stream that has computed the gradients: their memory is then free without waiting for another stream
    rows = packed_gradients(parameters, deepspeed.comm.get_world_size(group), dtype)
    for parameter in parameters:
        parameter.grad = None
    with _after_current_stream(optimizer.reduce_and_partition_stream, rows):
        rows.div_(len(rows))
        own = rows[deepspeed.comm.get_rank(group)]
        deepspeed.comm.reduce_scatter_fn(own, rows.view(-1), group=group, async_op=False)
        _keep(optimizer, parameters, own)


def packed_gradients(parameters: Sequence[Any], n_processes: int, dtype: torch.dtype) -> Tensor:
    """Return the packed gradients `(n_processes, elements)`: each row has one rank's partition of every gradient.

    The partition of a gradient of n elements has ceil(n / n_processes) elements; the last partition is padded with 0.
    """
    for parameter in parameters:
        if parameter.grad.numel() != parameter.ds_numel:
            raise RuntimeError(
                f"a gradient has {parameter.grad.numel()} elements, but its parameter has {parameter.ds_numel}"
            )
    gradients = [parameter.grad for parameter in parameters]
    converted = [gradient if gradient.dtype == dtype else gradient.to(dtype) for gradient in gradients]
    return torch._chunk_cat([gradient.reshape(-1) for gradient in converted], 0, n_processes)


def finish_reduction(optimizer: Any) -> None:
    """Reduce the buckets that are not full, as `independent_gradient_partition_epilogue` does.

    DeepSpeed waits for the GPU here. This function only makes the GPU's current stream wait for the reduction, so the
    CPU launches the update while the GPU computes the backward pass.
    """
    for dtype in sorted(optimizer.ipg_buckets, key=str):
        reduce_bucket(optimizer, dtype)
    accelerator = get_accelerator()
    if not accelerator.is_synchronized_device():
        accelerator.current_stream().wait_stream(optimizer.reduce_and_partition_stream)
    sums = getattr(optimizer, f"{PRIVATE}param_id_to_grad_partition")
    optimizer.averaged_gradients.update(
        {
            number: [sums[it.ds_id] if it.requires_grad else torch.zeros_like(it.ds_tensor) for it in parameters]
            for number, parameters in enumerate(optimizer.fp16_groups)
        }
    )
    # DeepSpeed counts the passes of a step by this attribute
    optimizer._epilogue_ran_this_backward = True


def prepare_gradient(optimizer: Any, number: int) -> None:
    """Join the gradients of a parameter group for the update, as `_prepare_fp32_grad_for_sub_group` does.

    DeepSpeed also notes for each gradient that the current stream reads it. The gradients are never freed.
    """
    weights = optimizer.fp32_partitioned_groups_flat[number]
    weights.grad = optimizer.flatten(optimizer.averaged_gradients[number]).to(weights.dtype)
    optimizer.averaged_gradients[number] = None


def point_to_weights(optimizer: Any, number: int) -> None:
    """Let partitions of parameters share the memory of the updated weights, as `_unflatten_partitioned_parameters`."""
    weights, partitions = optimizer.fp16_partitioned_groups_flat[number], optimizer.fp16_partitioned_groups[number]
    address = weights.data_ptr()
    for partition in partitions:
        if partition.data_ptr() != address:
            type(optimizer)._unflatten_partitioned_parameters(optimizer, number)
            return
        address += partition.nbytes


def _keep(optimizer: Any, parameters: Sequence[Any], own: Tensor) -> None:
    sums = getattr(optimizer, f"{PRIVATE}param_id_to_grad_partition")
    places = [sums[parameter.ds_id] for parameter in parameters]
    partitions = own.split([len(place) for place in places])
    if optimizer.micro_step_id == 0:
        torch._foreach_copy_(places, partitions)
    else:
        torch._foreach_add_(places, own.to(optimizer.gradient_accumulation_dtype).split(list(map(len, places))))


@contextlib.contextmanager
def _after_current_stream(stream: Any, used: Tensor) -> Iterator[None]:
    """Use another stream in this block, after the work of the current stream."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        yield
        return
    stream.wait_stream(accelerator.current_stream())
    with accelerator.stream(stream):
        yield
    # the memory is not used again before this stream has read it. An event would not do: `torch.Stream.wait_event`
    # returns without waiting if it is given a `torch.cuda.Event`
    used.record_stream(stream)
