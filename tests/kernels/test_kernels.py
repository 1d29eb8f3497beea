"""Each kernel gives what the plain formulas give in double precision, values and gradients, but for rounding."""

import os

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the beginning, as make test has it", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton, which torch brings along where it has CUDA")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
every_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# layers, documents, positions, slots, width; no power of two, one of each, and more rows than a tile has
every_size = pytest.mark.parametrize("sizes", [(2, 3, 11, 3, 48), (1, 1, 2, 1, 16), (3, 2, 21, 5, 20)], ids=str)


def randoms(dtype, *shapes):
    """Numbers that gradients are asked of, the last dimension taken out of a wider one."""
    torch.manual_seed(0)
    return [torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]].requires_grad_() for shape in shapes]


def check(fused, plain, inputs):
    """Compare what two functions give of the same numbers, and gradients of theirs that are not contiguous."""
    dtype = inputs[0].dtype
    doubles = [part.detach().double().requires_grad_() for part in inputs]
    found, expected = fused(*inputs), plain(*doubles)
    arriving = randoms(dtype, *(part.shape for part in expected))
    found_gradients = torch.autograd.grad(found, inputs, [part.detach() for part in arriving])
    gradients = torch.autograd.grad(expected, doubles, [part.detach().double() for part in arriving])
    for one, other in zip((*found, *found_gradients), (*expected, *gradients), strict=True):
        assert one.dtype == dtype
        tolerance = TOLERANCE[dtype] * float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=tolerance)


@every_type
@every_size
@pytest.mark.parametrize("may_rest", [False, True])
def test_gated_update(dtype, sizes, may_rest):
    from recurrent_bart.kernels.gated_update import gated_update

    n_layers, n_documents, _, n_slots, width = sizes
    n_rows = n_documents * n_slots
    is_read = torch.rand(n_layers, n_documents) < 0.5 if may_rest else None

    def plain(gate, bias, both):
        memory, slots = both.chunk(2, dim=-1)
        new = memory + torch.sigmoid(gate + bias) * (slots - memory)
        rests = torch.zeros(1, 1, dtype=torch.bool) if is_read is None else ~is_read.repeat_interleave(n_slots, dim=1)
        return [torch.where(rests.unsqueeze(-1), memory, new)]

    shapes = [(n_layers, n_rows, width), (n_layers, 1, width), (n_layers, n_rows, 2 * width)]
    check(lambda *inputs: [gated_update(*inputs, is_read)], plain, randoms(dtype, *shapes))


@every_type
@every_size
@pytest.mark.parametrize("has_slots", [False, True])
def test_residual_norm(dtype, sizes, has_slots):
    from recurrent_bart.kernels.residual_norm import residual_norm, residual_norm_and_slots

    n_layers, n_documents, n_positions, n_slots, width = sizes
    rows, affine = (n_layers, n_documents * n_positions, width), (n_layers, 1, width)

    def plain(stream, hidden, hidden_bias, weight, bias):
        normed = layer_norm(stream + hidden + hidden_bias, (width,), eps=1e-5) * weight + bias
        return [normed, normed.unflatten(1, (n_documents, -1))[:, :, :n_slots]][: 1 + has_slots]

    def fused(*inputs):
        if has_slots:
            return residual_norm_and_slots(*inputs, 1e-5, 0.0, n_documents, n_slots)
        return [residual_norm(*inputs, 1e-5, 0.0)]

    stream, hidden, *own = randoms(dtype, rows, rows, affine, affine, affine)
    own = [part.detach().contiguous().requires_grad_() for part in own]
    check(fused, plain, [stream, hidden, *own])


@every_type
@every_size
def test_bias_gelu(dtype, sizes):
    from recurrent_bart.kernels.bias_gelu import bias_gelu

    n_layers, n_documents, n_positions, _, width = sizes
    inputs = randoms(dtype, (n_layers, n_documents * n_positions, 5 * width), (n_layers, 1, 5 * width))
    inputs = [part.detach().contiguous().requires_grad_() for part in inputs]
    check(lambda *given: [bias_gelu(*given)], lambda hidden, bias: [gelu(hidden + bias)], inputs)
