"""Gradients accumulated from slice to slice equal autograd's."""

import pytest
import torch

from counted_calls import OperationsCalled
from recurrent_bart.recurrence.grouped_linear import StackedWeightSlice, linear, linear_with_input, slice_weights

SPANS = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
EVERYTHING = slice(None)
SECOND_HALF = slice(3, None)


@pytest.fixture
def stacks():
    """Return stacks of three layers: a map in a layer's own memory layout, its bias, and the gates of two heads."""
    return {
        "map": torch.randn(3, 6, 4, dtype=torch.float64).mT.requires_grad_(),
        "map_bias": torch.randn(3, 1, 6, dtype=torch.float64, requires_grad=True),
        "gate": torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
    }


def plain_span(stacks, first, stop):
    return {name: stack[first:stop] for name, stack in stacks.items()}


def work(take, stacks, rows, columns=EVERYTHING):
    """Return a loss per span on the same rows; each span uses the map twice."""
    given_on, found = dict(stacks), []
    for first, stop in SPANS:
        weights = take(given_on, first, stop)
        part, own_rows = linear_with_input(rows[first:stop], weights["map"], columns)
        whole = linear(own_rows.cos(), weights["map"], weights["map_bias"])
        found.append((whole * part.sin().sum() * weights["gate"].cos().sum()).sum())
    return found


@pytest.mark.parametrize("wanted", [["map", "map_bias", "gate", "rows"], ["map"], ["rows"], ["gate", "map_bias"]])
@pytest.mark.parametrize("used", [SPANS, SPANS[:2], SPANS[3:4]])
@pytest.mark.parametrize("columns", [EVERYTHING, SECOND_HALF])
def test_values_and_gradients_are_autograds(stacks, wanted, used, columns):
    """Losses of all or some spans, differentiated twice, for any subset of inputs."""
    rows = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    sources = [{**stacks, "rows": rows}[name] for name in wanted]
    expected = work(plain_span, stacks, rows, columns)
    found = work(slice_weights, stacks, rows, columns)
    torch.testing.assert_close(found, expected)
    losses = [sum(parts[SPANS.index(span)] for span in used) for parts in (expected, found, found)]
    gradients = [torch.autograd.grad(loss, sources, retain_graph=True) for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("frozen", ["map", "map_bias", "gate", "rows"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_others(stacks, frozen):
    tensors = {**stacks, "rows": torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)}
    tensors[frozen].requires_grad_(False)
    rows = tensors.pop("rows")
    found = []
    for take in (plain_span, slice_weights):
        sum(work(take, tensors, rows)).backward()
        found.append({name: tensor.grad for name, tensor in {**tensors, "rows": rows}.items()})
        for tensor in (*tensors.values(), rows):
            tensor.grad = None
    assert found[1].pop(frozen) is found[0].pop(frozen) is None
    torch.testing.assert_close(found[1], found[0])


def test_without_a_graph_weights_are_views(stacks):
    with torch.no_grad():
        taken = slice_weights(dict(stacks), 1, 3)
    for name, weight in taken.items():
        assert weight.data_ptr() == stacks[name][1:3].data_ptr()
        assert torch.equal(weight, stacks[name][1:3])


def test_gradients_are_added_to_what_arrives_in_place(stacks):
    """Captured diagonals rely on this."""
    rows = torch.randn(3, 5, 4, dtype=torch.float64)

    def loss(weights):
        return (linear(rows, weights["map"], weights["map_bias"]) * weights["gate"].sum()).sum()

    expected = torch.autograd.grad(loss(stacks), stacks.values())
    given_on = dict(stacks)
    outputs = [loss(slice_weights(given_on, 0, 3)), *given_on.values()]
    arriving = [torch.ones_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, stacks.values(), arriving)
    for total, gradient, own in zip(arriving[1:], found, expected, strict=True):
        assert gradient.data_ptr() == total.data_ptr()
        torch.testing.assert_close(total, own + 1)


def test_a_maps_gradient_is_computed_where_it_is_added_up(stacks):
    """A layer's map has 24 numbers. No other tensor has the size of one, two or three layers' maps."""
    losses = work(slice_weights, stacks, torch.randn(3, 5, 4, dtype=torch.float64))
    with OperationsCalled({24, 48, 72}) as operations:
        sum(losses).backward()
    # two products per span, and one buffer for the stack
    assert sorted(operations.found) == ["baddbmm_.default"] * 2 * len(SPANS) + ["zeros_like.default"]


def test_under_autocast_gradients_are_autograds(stacks):
    stacks = {name: stack.detach().float().requires_grad_() for name, stack in stacks.items()}
    rows = torch.randn(3, 5, 4)
    gradients = []
    for take in (plain_span, slice_weights):
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(work(take, stacks, rows))
        gradients.append(torch.autograd.grad(loss, stacks.values()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)
    assert any(isinstance(weight, StackedWeightSlice) for weight in slice_weights(stacks, 0, 3).values())
