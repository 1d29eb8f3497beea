"""Reduction of ZeRO-2 gradients per bucket, bitwise equal to DeepSpeed's reduction.

DeepSpeed copies each gradient into the bucket, converts it, adds it to its sum and copies it back: half of the kernel
launches and copies of a training step of a small model (benchmarks/LOG.md). On three or more processes, a gradient that
is larger than a bucket may differ in the last bit: DeepSpeed exchanges it in parts, this module as a whole.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import torch
from torch import Tensor

from recurrent_bart.training.zero.float32_sums import add_pairs
from recurrent_bart.training.zero.gradient_exchange import has_offload


def can_sum_partitions(optimizer: Any) -> bool:
    """Return True if `PartitionBuckets` supports an optimizer's settings.

    The rank's partitions of gradients must have float32 sums on the GPU, and one all-reduce must average a bucket.
    Experts of a mixture reduce their gradients in other groups.
    """
    is_other = optimizer.zenflow or optimizer.overlap_comm or optimizer.has_moe_layers or optimizer.autoep_folding_spec
    is_usual = optimizer.contiguous_gradients and optimizer.reduce_scatter and optimizer.gradient_average
    reduces_all = optimizer.use_multi_rank_bucket_allreduce and optimizer.sequence_parallel_size == 1
    groups = range(len(optimizer.bit16_groups))
    has_sums = all(map(optimizer._use_compact_grad_partition_buffer, groups))
    return is_usual and reduces_all and has_sums and not (is_other or has_offload(optimizer))


def point_to_weights(optimizer: Any, number: int) -> None:
    """Let parameters share the memory of the updated weights, as `_update_model_bit16_weights` does.

    DeepSpeed makes a view of each parameter after each update, while the GPU waits. They share that memory already,
    unless something has moved them.
    """
    flat = optimizer.bit16_groups_flat[number]
    first, size = flat.data_ptr(), flat.element_size()
    members = zip(optimizer.round_robin_bit16_groups[number], optimizer.round_robin_bit16_offsets[number], strict=True)
    if any(parameter.data_ptr() != first + offset * size for parameter, offset in members):
        type(optimizer)._update_model_bit16_weights(optimizer, number)


class PartitionBuckets:
    """Buckets of gradients whose float32 sums are partitioned over ranks.

    Args:
        optimizer: DeepSpeed's ZeRO-2 optimizer.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.n_processes = deepspeed.comm.get_world_size(group=optimizer.dp_process_group)

    def begin(self) -> None:
        """Count a backward pass at its first gradient, as `setup_buckets` does, without memory for the buckets."""
        if not self.optimizer.ready_for_gradients:
            self.optimizer.micro_step_id += 1
            self.optimizer.ready_for_gradients = True

    def add(self, parameter: Any, group: int) -> None:
        """Add a gradient to the bucket of its data type. Reduce the bucket first if the gradient does not fit.

        Args:
            parameter: Parameter with a gradient.
            group: Number of the parameter's group.
        """
        optimizer = self.optimizer
        dtype = optimizer.get_param_comm_dtype(parameter)
        bucket = optimizer.ipg_buckets[dtype]
        if bucket.elements and bucket.elements + parameter.numel() > optimizer.reduce_bucket_size:
            self.reduce_bucket(dtype)
        if parameter.numel() and getattr(parameter, "ds_grad_is_ready", True):
            bucket.params.append((group, parameter.param_idx_in_group, optimizer.get_param_id(parameter)))
            bucket.grads.append(optimizer.get_gradient_for_reduction(parameter))
            bucket.elements += parameter.numel()

    def reduce(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the bucket of a data type, or all buckets."""
        for dtype in [comm_dtype] if comm_dtype else sorted(self.optimizer.ipg_buckets, key=str):
            self.reduce_bucket(dtype)

    @torch.no_grad()
    def reduce_bucket(self, dtype: torch.dtype) -> None:
        """Average the gradients of a bucket over ranks. Add this rank's partitions to the sums. Free the gradients.

        Args:
            dtype: Data type in which the gradients are exchanged.

        Raises:
            RuntimeError: A gradient was reduced before in this backward pass.
        """
        optimizer = self.optimizer
        bucket = optimizer.ipg_buckets[dtype]
        members, gradients = list(bucket.params), list(bucket.grads)
        bucket.clear()
        if not members:
            return
        for group, index, number in members:
            if optimizer.params_already_reduced[number]:
                raise RuntimeError("a gradient was added twice to a bucket: it has changed before it was reduced")
            optimizer.params_already_reduced[number] = True
            optimizer.clear_grad_attribute(optimizer.bit16_groups[group][index])
        averaged = self._average(gradients, dtype)
        pairs = [self._own(group, number, mean) for (group, _, number), mean in zip(members, averaged, strict=True)]
        if own := [pair for pair in pairs if pair is not None]:
            add_pairs(own)

    def _average(self, gradients: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the gradients, averaged over ranks, `(elements,)` each."""
        staging = self.optimizer._gradient_reduction_buffer_dtype()
        flat = [gradient.reshape(-1).to(staging) for gradient in gradients]
        if self.n_processes == 1:
            return [gradient.to(dtype) for gradient in flat]
        # DeepSpeed divides before it converts
        joined = (flat[0] if len(flat) == 1 else torch.cat(flat)).div_(self.n_processes).to(dtype)
        deepspeed.comm.all_reduce(joined, group=self.optimizer.dp_process_group)
        return joined.split([gradient.numel() for gradient in gradients])

    def _own(self, group: int, number: int, averaged: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return this rank's sum and part of an averaged gradient, or None if the gradient belongs to other ranks."""
        optimizer = self.optimizer
        rank = deepspeed.comm.get_rank(group=optimizer.real_dp_process_group[group])
        starts = optimizer.grad_start_offset[group][rank]
        if number not in starts:
            return None
        source, target = int(starts[number]), int(optimizer.grad_partition_insertion_offset[group][rank][number])
        length = min(averaged.numel() - source, int(optimizer.partition_size[group]) - target)
        sums = optimizer._get_compact_grad_partition_buffer(group).flat_partition
        return sums.narrow(0, target, length), averaged.narrow(0, source, length)
