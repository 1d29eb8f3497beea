"""Kernels equal plain formulas in double precision, in values and gradients, up to rounding."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from recurrent_bart.recurrence.cell import within_range

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# layers, documents, positions, slots, width: not powers of two, minimal sizes, and more rows than a tile
SIZES = [(2, 3, 11, 3, 48), (1, 1, 2, 1, 16), (3, 2, 21, 5, 20)]


def every_pair(name, *variants):
    """Parametrize a test so that each pair of a type, a size and a variant occurs, because the interpreter is slow.

    `make test` runs cases that together hold each value.
    """
    cases = [
        (dtype, sizes, variants[(row + column) % len(variants)])
        for row, dtype in enumerate(TOLERANCE)
        for column, sizes in enumerate(SIZES)
    ]
    # the text of a function holds its address, which differs between processes
    cases = pytest.mark.parametrize(("dtype", "sizes", name), cases, ids=lambda it: getattr(it, "__name__", str(it)))
    return lambda test: pytest.mark.each_value(cases(test))


def randoms(dtype, *shapes):
    """Return random tensors that require gradients, with a non-contiguous last dimension."""
    torch.manual_seed(0)
    return [torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]].requires_grad_() for shape in shapes]


def check(fused, plain, inputs):
    """Compare values and gradients of two functions on the same inputs, for non-contiguous output gradients."""
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


@every_pair("may_rest", False, True)
def test_gated_update(dtype, sizes, may_rest):
    from recurrent_bart.execution.kernels.gated_update import gated_update

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


@pytest.mark.slow
@every_pair("gives", "stream", "slots", "memory and slots", "sum")
def test_residual_norm(dtype, sizes, gives):
    from recurrent_bart.execution.kernels.residual_norm import (
        residual_norm,
        residual_norm_and_slots,
        residual_norm_and_sum,
    )

    n_layers, n_documents, n_positions, n_slots, width = sizes
    rows, affine = (n_layers, n_documents * n_positions, width), (n_layers, 1, width)

    def plain(stream, hidden, memory, hidden_bias, weight, bias):
        normed = layer_norm(stream + hidden + hidden_bias, (width,), eps=1e-5) * weight + bias
        slots = normed.unflatten(1, (n_documents, -1))[:, :, :n_slots]
        if gives == "sum":
            return [normed + 0 * memory.sum(), stream + hidden + hidden_bias]
        if gives == "memory and slots":
            return [normed, torch.cat([memory, slots.flatten(1, 2)], dim=-1)]
        return [normed + 0 * memory.sum(), slots][: 1 + (gives == "slots")]

    def fused(stream, hidden, memory, *affine):
        if gives == "memory and slots":
            return residual_norm_and_slots(stream, hidden, *affine, 1e-5, 0.0, n_documents, n_slots, memory)
        stream = stream + 0 * memory.sum()
        if gives == "sum":
            return residual_norm_and_sum(stream, hidden, *affine, 1e-5, 0.0)
        if gives == "slots":
            return residual_norm_and_slots(stream, hidden, *affine, 1e-5, 0.0, n_documents, n_slots)
        return [residual_norm(stream, hidden, *affine, 1e-5, 0.0)]

    memory = n_layers, n_documents * n_slots, width
    stream, hidden, memory, *own = randoms(dtype, rows, rows, memory, affine, affine, affine)
    own = [part.detach().contiguous().requires_grad_() for part in own]
    check(fused, plain, [stream, hidden, memory, *own])


@pytest.mark.parametrize(("dtype", "sizes"), [*zip(TOLERANCE, SIZES, strict=True)], ids=str)
def test_norm_with_input(dtype, sizes):
    from recurrent_bart.execution.kernels.residual_norm import norm_with_input

    n_layers, n_documents, n_positions, _, width = sizes

    def plain(stream, weight, bias):
        return [layer_norm(stream, (width,), eps=1e-5) * weight + bias, stream]

    affine = n_layers, 1, width
    stream, *own = randoms(dtype, (n_layers, n_documents * n_positions, width), affine, affine)
    own = [part.detach().contiguous().requires_grad_() for part in own]
    check(lambda *inputs: norm_with_input(*inputs, 1e-5), plain, [stream, *own])


@pytest.mark.slow
@every_pair("has_memory", False, True)
def test_residual_sum(dtype, sizes, has_memory):
    from recurrent_bart.execution.kernels.residual_sum import residual_sum_and_slots

    n_layers, n_documents, n_positions, n_slots, width = sizes
    rows, affine = (n_layers, n_documents * n_positions, width), (n_layers, 1, width)

    def plain(stream, hidden, memory, hidden_bias, weight, bias):
        summed = stream + hidden + hidden_bias
        slots = layer_norm(summed.unflatten(1, (n_documents, -1))[:, :, :n_slots], (width,), eps=1e-5)
        slots = slots * weight.unsqueeze(1) + bias.unsqueeze(1)
        if has_memory:
            return [summed, torch.cat([memory, slots.flatten(1, 2)], dim=-1)]
        return [summed + 0 * memory.sum(), slots]

    def fused(stream, hidden, memory, *affine):
        sizes = n_documents, n_slots
        if has_memory:
            return residual_sum_and_slots(stream, hidden, *affine, 1e-5, 0.0, *sizes, memory)
        return residual_sum_and_slots(stream + 0 * memory.sum(), hidden, *affine, 1e-5, 0.0, *sizes)

    memory = n_layers, n_documents * n_slots, width
    stream, hidden, memory, *own = randoms(dtype, rows, rows, memory, affine, affine, affine)
    own = [part.detach().contiguous().requires_grad_() for part in own]
    check(fused, plain, [stream, hidden, memory, *own])


@pytest.mark.parametrize("added", [0.0, 65_000.0, float("inf"), float("-inf"), float("nan")])
def test_float16_sums_are_clamped_as_in_mbarts_layers(added):
    """Clamped numbers get no gradient; NaN stays, so that the training step is skipped."""
    from recurrent_bart.execution.kernels.residual_sum import residual_sum_and_slots

    stream, hidden = (it.detach().contiguous() for it in randoms(torch.float16, (1, 6, 16), (1, 6, 16)))
    hidden[0, 2, 3] = hidden[0, 4, 5] = added
    inputs = [stream.requires_grad_(), hidden.requires_grad_()]
    bias, weight = torch.zeros(1, 1, 16, dtype=torch.float16), torch.ones(1, 1, 16, dtype=torch.float16)
    found, _ = residual_sum_and_slots(*inputs, bias, weight, bias, 1e-5, 0.0, 2, 1)
    # the first position of both documents is a slot; here its norm gets no gradient
    expected = within_range(stream + hidden)
    torch.testing.assert_close(found, expected, equal_nan=True)
    arriving = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(out, inputs, arriving) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_of_a_residual_sum_is_the_same_again_in_the_backward_pass():
    """A gradient is zero where the output is zero, and scaled like the output elsewhere."""
    from recurrent_bart.execution.kernels.residual_sum import residual_sum_and_slots

    torch.manual_seed(0)
    ones, nothing = torch.ones(2, 12, 48, requires_grad=True), torch.zeros(2, 1, 48)
    out, _ = residual_sum_and_slots(torch.zeros(2, 12, 48), ones, nothing, nothing + 1, nothing, 1e-5, 0.3, 2, 3)
    assert (out == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    out.sum().backward()
    torch.testing.assert_close(ones.grad, out.detach())


@pytest.mark.slow
@pytest.mark.parametrize("last_sum", ["residual_norm_and_slots", "residual_sum_and_slots"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_a_graph_results_are_left_in_their_places(p, last_sum):
    """Output buffers get the same values; the stream's buffer may be the input."""
    from recurrent_bart.execution.kernels import residual_norm, residual_sum
    from recurrent_bart.execution.kernels.gated_update import gated_update

    last_sum = getattr(residual_sum if "sum" in last_sum else residual_norm, last_sum)
    stream, hidden = randoms(torch.float32, (2, 33, 48), (2, 33, 48))
    affine = [part.contiguous() for part in randoms(torch.float32, *[(2, 1, 48)] * 3)]
    memory = torch.randn(2, 12, 48)
    torch.manual_seed(1)
    expected = last_sum(stream, hidden, *affine, 1e-5, p, 3, 4, memory)
    place = stream.detach().contiguous()
    torch.manual_seed(1)
    with torch.no_grad():
        found = last_sum(place, hidden, *affine, 1e-5, p, 3, 4, memory, place)
    assert found[0].data_ptr() == place.data_ptr()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    gate, bias, both = (part.detach() for part in randoms(torch.float32, (2, 12, 48), (2, 1, 48), (2, 12, 96)))
    place = torch.empty(2, 12, 48)
    assert gated_update(gate, bias, both, None, place).data_ptr() == place.data_ptr()
    assert torch.equal(place, gated_update(gate, bias, both, None))


@every_pair("activation", gelu, torch.tanh)
def test_bias_activation(dtype, sizes, activation):
    from recurrent_bart.execution.kernels.bias_activation import bias_gelu, bias_tanh

    n_layers, n_documents, n_positions, _, width = sizes
    inputs = randoms(dtype, (n_layers, n_documents * n_positions, 5 * width), (n_layers, 1, 5 * width))
    inputs = [part.detach().contiguous().requires_grad_() for part in inputs]
    fused = bias_gelu if activation is gelu else bias_tanh
    check(lambda *given: [fused(*given)], lambda hidden, bias: [activation(hidden + bias)], inputs)


def plain_heads(n_documents, n_slots, n_heads, is_gated):
    """Compute `split_heads` by plain operations."""

    def plain(qkv, bias, prefix, prefix_bias):
        qkv = qkv + bias.repeat_interleave(n_documents, dim=0)
        three = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
        prefix = (prefix + prefix_bias).view(len(qkv), n_slots, 2, n_heads, -1).permute(2, 0, 3, 1, 4)
        query, *both = [(part[:, :, :n_slots], part[:, :, n_slots:]) for part in three]
        slots_see = [torch.cat([slots, own, tokens], 2) for (slots, tokens), own in zip(both, prefix, strict=True)]
        if is_gated:
            return [query[0], *slots_see, query[1], *(tokens for _, tokens in both), query[1], *prefix]
        tokens_see = [torch.cat([own, tokens], 2) for (_, tokens), own in zip(both, prefix, strict=True)]
        return [query[0], *slots_see, query[1], *tokens_see]

    return plain


@pytest.mark.slow
@every_pair("is_gated", False, True)
def test_split_heads(dtype, sizes, is_gated):
    from recurrent_bart.execution.kernels.heads import split_heads

    n_layers, n_documents, n_positions, n_slots, width = sizes
    n_heads = 2 if width % 3 else 3
    shapes = [(n_layers * n_documents, n_positions, 3 * width), (n_layers, 1, 3 * width)]
    shapes += [(n_layers, n_documents * n_slots, 2 * width), (n_layers, 1, 2 * width)]
    qkv, bias, *prefix = randoms(dtype, *shapes)
    bias = bias.detach().contiguous().requires_grad_()
    check(
        lambda *inputs: [part for part in split_heads(*inputs, n_heads, is_gated, 0.0) if part is not None],
        plain_heads(n_documents, n_slots, n_heads, is_gated),
        [qkv, bias, *prefix],
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_same_numbers_of_a_prefix_are_dropped_in_the_backward_pass(is_gated):
    """A gradient is zero where the output is zero, and scaled like the output elsewhere."""
    from recurrent_bart.execution.kernels.heads import split_heads

    torch.manual_seed(0)
    prefix = torch.ones(2, 3 * 4, 2 * 48, requires_grad=True)
    nothing = torch.zeros(6, 9, 3 * 48), torch.zeros(2, 1, 3 * 48)
    heads = split_heads(*nothing, prefix, torch.zeros(2, 1, 2 * 48), 3, is_gated, 0.3)
    kept = torch.stack([heads.slots_key, heads.slots_value])[:, :, :, 4:8].permute(1, 3, 0, 2, 4).reshape(prefix.shape)
    assert (kept == 0).float().mean() == pytest.approx(0.3, abs=0.05)
    (heads.slots_key.sum() + heads.slots_value.sum()).backward()
    torch.testing.assert_close(prefix.grad, kept)
    again = split_heads(*nothing, prefix, torch.zeros(2, 1, 2 * 48), 3, is_gated, 0.3)
    assert not torch.equal(again.slots_key, heads.slots_key)


# without bfloat16, whose bit patterns the interpreter's matrix product multiplies
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 70, 3, 48), (1, 1, 1, 1, 16), (3, 2, 21, 5, 20)], ids=str)
def test_add_prefix_read(dtype, sizes):
    """More than one tile of 64 tokens."""
    from recurrent_bart.execution.kernels.gated_prefix import add_prefix_read

    n_layers, n_documents, n_tokens, n_slots, width = sizes
    n_rows, n_heads = n_layers * n_documents, 2
    slots, tokens = (n_rows, n_slots, n_heads, width), (n_rows, n_tokens, n_heads, width)
    query, prefix = (n_rows, n_heads, n_tokens, width), (n_rows, n_heads, n_slots, width)

    def plain(slots, tokens, query, key, value, gate):
        read = torch.softmax(query @ key.mT * 0.3, dim=-1) @ value
        opening = gate.tanh().repeat_interleave(n_documents, dim=0)[:, None, :, None]
        return [torch.cat([slots, tokens + opening * read.transpose(1, 2)], dim=1).flatten(2)]

    inputs = randoms(dtype, slots, tokens, query, prefix, prefix, (n_layers, n_heads))
    check(lambda *given: [add_prefix_read(*given, 0.3)], plain, inputs)
