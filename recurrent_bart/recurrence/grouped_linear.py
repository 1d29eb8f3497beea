"""Some layers of stacked weights, and how their gradients are added up without a copy.

Views of one tensor would each have a gradient of the whole tensor's size, to be added up. Here each span gives the
stack on to the next one, so that one gradient comes back from span to span, and each adds its own part to it; of a
map, the product that computes the part does.

Shape suffixes: E encoder layers (of a span), M rows of a layer, X any width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class StackedWeightSlice:
    """Some layers' maps, to be multiplied with by `linear`.

    Attributes:
        stacks: Stacks by name, as the last product has given them on.
        name: Which of them.
        layers: Which layers.
    """

    stacks: dict[str, Tensor]
    name: str
    layers: slice


def slice_weights(stacks: dict[str, Tensor], first: int, stop: int) -> dict[str, Tensor | StackedWeightSlice]:
    """Of layers `first` to `stop`, their weights: views, of maps that get a gradient spans.

    Args:
        stacks: By name, stacked by layer; in their place come those that the next span is to be taken from.
        first: Lowest layer.
        stop: One above the highest.
    """
    layers = slice(first, stop)
    trained = [name for name, stack in stacks.items() if stack.requires_grad and torch.is_grad_enabled()]
    maps = [name for name in trained if _is_map(stacks[name])]
    others = [name for name in trained if name not in maps]
    taken = {name: stack[layers] for name, stack in stacks.items() if name not in trained}
    if others:
        views_and_stacks = _SliceWeights.apply(layers, *(stacks[name] for name in others))
        taken |= zip(others, views_and_stacks, strict=False)
        stacks |= zip(others, views_and_stacks[len(others) :], strict=True)
    return taken | {name: StackedWeightSlice(stacks, name, layers) for name in maps}


def linear(
    rows_EMX: Tensor, weight: Tensor | StackedWeightSlice, bias: Tensor | None = None, columns: slice = slice(None)
) -> Tensor:
    """Each layer's map, or some columns of it, as one batched product: `(E, M, in)` to `(E, M, out)`.

    Args:
        rows_EMX: Rows of each layer.
        weight: `(E, in, all columns)`.
        bias: `(E, 1, out)`.
        columns: Which.
    """
    return _linear(rows_EMX, weight, bias, columns)[0]


def linear_with_input(
    rows_EMX: Tensor, weight: Tensor | StackedWeightSlice, columns: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """As `linear`, and the rows again, for what else is done with them.

    Of a span, the product's gradient is then added to the one that comes back of that, in place: there must be one
    such use, whose backward pass gives a tensor that nothing which comes after it needs.
    """
    return _linear(rows_EMX, weight, None, columns)


def _linear(
    rows: Tensor, weight: Tensor | StackedWeightSlice, bias: Tensor | None, columns: slice
) -> tuple[Tensor, Tensor]:
    if isinstance(weight, StackedWeightSlice):
        place, stack = (weight.layers, slice(None), columns), weight.stacks[weight.name]
        mapped, rows, weight.stacks[weight.name] = _SliceProduct.apply(place, rows, stack, bias)
        return mapped, rows
    return _product(rows, weight[..., columns], bias), rows


def _is_map(stack: Tensor) -> bool:
    """Not of a bias, a norm or gates; none under autocast, where products are of other types than their weights."""
    device = stack.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return stack.dim() == 3 and stack.shape[1] > 1 and not is_cast


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)


class _SliceWeights(torch.autograd.Function):
    """From stacks, views of some layers of each, and the stacks again."""

    @staticmethod
    def forward(ctx: Any, layers: slice, *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.layers, ctx.shapes = layers, [stack.shape for stack in stacks]
        ctx.set_materialize_grads(False)
        return (*(stack[layers] for stack in stacks), *stacks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        n_stacks = len(ctx.shapes)
        own, whole = gradients[:n_stacks], list(gradients[n_stacks:])
        there = [number for number, gradient in enumerate(own) if gradient is not None]
        for number in there:
            if whole[number] is None:
                whole[number] = own[number].new_zeros(ctx.shapes[number])
        if there:
            # nobody else has what is added to: it was made here, or by the next span's backward pass
            torch._foreach_add_([whole[number][ctx.layers] for number in there], [own[number] for number in there])
        return None, *whole


class _SliceProduct(torch.autograd.Function):
    """From rows and a stack, the rows' product with some of it, and both again."""

    @staticmethod
    def forward(
        ctx: Any, place: tuple[slice, ...], rows: Tensor, stack: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.place = place
        ctx.save_for_backward(rows, stack)
        ctx.set_materialize_grads(False)
        return _product(rows, stack[place], bias), rows, stack

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, arriving: Tensor | None, input_gradient: Tensor | None, whole: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if arriving is None:
            return None, input_gradient, whole, None
        rows, stack = ctx.saved_tensors
        if whole is None:
            whole = torch.zeros_like(stack)
        # nobody else has it, as above; transposed as a layer's own maps are laid out
        whole[ctx.place].mT.baddbmm_(arriving.mT, rows)
        if ctx.needs_input_grad[1]:
            weight = stack[ctx.place].mT
            input_gradient = (
                torch.bmm(arriving, weight) if input_gradient is None else input_gradient.baddbmm_(arriving, weight)
            )
        bias_gradient = arriving.sum(dim=1, keepdim=True) if ctx.needs_input_grad[3] else None
        return None, input_gradient, whole, bias_gradient
