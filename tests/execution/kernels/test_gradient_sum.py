"""The kernel adds what PyTorch adds, to the last bit, for all sizes and layouts."""

import pytest
import torch

SIZES = [(), (1,), (4096,), (4097,), (3, 5000), (64, 128)]


def pairs(dtype):
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        yield torch.randn(size, generator=generator), torch.randn(size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_added_to_sums_in_float32(dtype):
    from recurrent_bart.execution.kernels.gradient_sum import add_to_sums, can_add

    sums, gradients = map(list, zip(*pairs(dtype), strict=True))
    sums.append(torch.randn(20, 30).mT)
    gradients.append(torch.randn(20, 30).to(dtype).mT)
    assert all(map(can_add, sums, gradients))
    expected = [total + gradient.float() for total, gradient in zip(sums, gradients, strict=True)]
    add_to_sums(sums, gradients)
    for total, right in zip(sums, expected, strict=True):
        assert torch.equal(total, right)


@pytest.mark.parametrize(
    ("total", "gradient"),
    [
        (torch.zeros(4, 6), torch.zeros(6, 4, dtype=torch.bfloat16).mT),
        (torch.zeros(4, 6), torch.zeros(4, 12, dtype=torch.bfloat16)[:, ::2]),
        (torch.zeros(8)[1:], torch.zeros(7, dtype=torch.bfloat16)),
        (torch.zeros(8), torch.zeros(9, dtype=torch.bfloat16)[1:]),
        (torch.zeros(8), torch.zeros(8)),
        (torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.bfloat16)),
    ],
    ids=["other layout", "not dense", "sum not aligned", "gradient not aligned", "float32", "float64"],
)
def test_pairs_that_the_kernel_cannot_add_are_found(total, gradient):
    from recurrent_bart.execution.kernels.gradient_sum import can_add

    assert not can_add(total, gradient)
