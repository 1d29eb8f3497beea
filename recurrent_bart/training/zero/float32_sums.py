"""Addition of gradients to sums of another data type, in few kernel launches."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def add_gradients(
    sums: Sequence[Tensor | None], gradients: Sequence[Tensor | None], dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """Add gradients to sums of another data type. Return the sums.

    Existing sums are changed in place. A gradient without a sum becomes the sum, in data type `dtype`. A sum without a
    gradient stays.
    """
    pairs = [(total, new) for total, new in zip(sums, gradients, strict=True) if new is not None]
    earlier = [(total, new) for total, new in pairs if total is not None]
    if earlier:
        add_pairs(earlier)
    first = [new for total, new in pairs if total is None]
    copies = [torch.empty_like(new, dtype=dtype) for new in first]
    if first:
        torch._foreach_copy_(copies, first)
    rest = iter(copies)
    return [
        next(rest) if total is None and new is not None else total for total, new in zip(sums, gradients, strict=True)
    ]


def add_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the second tensor of each pair to the first. On a GPU, use one kernel launch where data types allow it."""
    by_kernel: list[tuple[Tensor, Tensor]] = []
    if pairs[0][0].is_cuda and importlib.util.find_spec("triton") is not None:
        from recurrent_bart.execution.kernels.gradient_sum import add_to_sums, can_add

        by_kernel = [pair for pair in pairs if pair[1].dtype == pairs[0][1].dtype and can_add(*pair)]
        if by_kernel:
            with torch.cuda.device(by_kernel[0][0].device):
                add_to_sums(*zip(*by_kernel, strict=True))
    added = {id(total) for total, _ in by_kernel}
    rest = [pair for pair in pairs if id(pair[0]) not in added]
    if rest:
        # one kernel launch for each parameter, where the data types differ
        torch._foreach_add_(*map(list, zip(*rest, strict=True)))
