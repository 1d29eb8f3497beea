"""Add many gradients to float32 sums in one kernel launch.

If gradients and sums differ in data type, PyTorch launches one kernel per tensor. For the 500 parameters of BART-large
this takes 4.2 ms on an H200; moving the bytes takes 1 ms.
"""

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from recurrent_bart.recurrence.segmentation import to_device

# elements of one program
BLOCK = 4096
# bytes to which the addresses of all tensors are aligned, so that a thread moves several elements at once
ALIGNMENT = 16
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def can_add(total: Tensor, gradient: Tensor) -> bool:
    """Return True if the kernel supports two tensors: dense, same memory layout, aligned, of supported types."""
    return (
        total.dtype == torch.float32
        and gradient.dtype in TYPES
        and total.stride() == gradient.stride()
        and (total.is_contiguous() or (total.dim() == 2 and total.mT.is_contiguous()))
        and total.data_ptr() % ALIGNMENT == gradient.data_ptr() % ALIGNMENT == 0
    )


def add_to_sums(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add each gradient to its sum, in place.

    Args:
        sums: Tensors of float32 on one device.
        gradients: Tensors of one data type for which `can_add` holds.
    """
    device = sums[0].device
    tensor, first, sizes = _blocks(tuple(total.numel() for total in sums), device)
    addresses = to_device(torch.tensor([[part.data_ptr() for part in parts] for parts in (sums, gradients)]), device)
    _add[(len(tensor),)](*addresses, tensor, first, sizes, TYPE=TYPES[gradients[0].dtype], BLOCK=BLOCK)


# a step has a key for each bucket of gradients
@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor index and the block index of each program, and the sizes of all tensors."""
    counts = [triton.cdiv(size, BLOCK) for size in sizes]
    tensor = torch.repeat_interleave(torch.tensor(counts))
    block = torch.cat([torch.arange(count) for count in counts])
    return to_device(tensor.int(), device), to_device(block.int(), device), to_device(torch.tensor(sizes), device)


@triton.jit
def _add(sums, gradients, tensor, block, sizes, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    number = tl.load(tensor + program)
    start = tl.load(block + program).to(tl.int64) * BLOCK
    size = tl.load(sizes + number)
    total = tl.multiple_of(tl.load(sums + number), 16).to(tl.pointer_type(tl.float32))
    gradient = tl.multiple_of(tl.load(gradients + number), 16).to(tl.pointer_type(TYPE))
    place = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        # without a mask, several elements are moved at once
        added = tl.load(total + place) + tl.load(gradient + place).to(tl.float32)
        tl.store(total + place, added)
    else:
        inside = place < size
        added = tl.load(total + place, inside, 0.0) + tl.load(gradient + place, inside, 0.0).to(tl.float32)
        tl.store(total + place, added, inside)
