"""Slices of stacked weights whose gradients are accumulated in place."""

# Autograd gives each view of a tensor a gradient of the whole tensor's size and adds these gradients. Here each slice
# returns the whole stack, which the next slice uses. So the backward pass hands one gradient buffer from slice to
# slice, and each slice adds its own gradient in place. For linear maps, the matrix product itself does this addition.

# Shape suffixes: E encoder layers (of a slice), M rows of a layer, X any width.

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class StackedWeightSlice:
    """Weights of the linear maps of some layers; `linear` multiplies rows by these weights."""

    # stacks by name; each product replaces the stack that it used
    stacks: dict[str, Tensor]
    name: str
    layers: slice


def slice_weights(stacks: dict[str, Tensor], first: int, stop: int) -> dict[str, Tensor | StackedWeightSlice]:
    """Return the weights of layers `first` to `stop - 1`.

    A trained linear map has a `StackedWeightSlice`, a frozen one has a view.

    `stacks` holds weights stacked by layer. Its entries are replaced by the stacks that the next slice must use.
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
    """Apply each layer's map, or some of its output columns, as one batched product: `(E, M, in)` to `(E, M, out)`.

    `weight` is `(E, in, all columns)` and `bias` is `(E, 1, out)`.
    """
    return _linear(rows_EMX, weight, bias, columns)[0]


def linear_with_input(
    rows_EMX: Tensor, weight: Tensor | StackedWeightSlice, columns: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Apply `linear`. Also return the input rows; the caller must use the returned rows exactly once.

    The backward pass of a `StackedWeightSlice` adds the product's gradient in place to the gradient that arrives at the
    returned rows. So no other code may need that gradient tensor.
    """
    return _linear(rows_EMX, weight, None, columns)


def _linear(
    rows: Tensor, weight: Tensor | StackedWeightSlice, bias: Tensor | None, columns: slice
) -> tuple[Tensor, Tensor]:
    if isinstance(weight, StackedWeightSlice):
        index, stack = (weight.layers, slice(None), columns), weight.stacks[weight.name]
        mapped, rows, weight.stacks[weight.name] = _SliceProduct.apply(index, rows, stack, bias)
        return mapped, rows
    return _product(rows, weight[..., columns], bias), rows


def _is_map(stack: Tensor) -> bool:
    """Return True if a stack holds linear maps.

    Return False under autocast, because products and weights then have different dtypes.
    """
    device = stack.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return stack.dim() == 3 and stack.shape[1] > 1 and not is_cast


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)


class _SliceWeights(torch.autograd.Function):
    """Function that returns views of some layers of each stack, and then the unchanged stacks."""

    @staticmethod
    def forward(ctx: Any, layers: slice, *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.layers, ctx.shapes = layers, [stack.shape for stack in stacks]
        ctx.set_materialize_grads(False)
        return (*(stack[layers] for stack in stacks), *stacks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        n_stacks = len(ctx.shapes)
        own, grad_stack = gradients[:n_stacks], list(gradients[n_stacks:])
        there = [number for number, gradient in enumerate(own) if gradient is not None]
        for number in there:
            if grad_stack[number] is None:
                grad_stack[number] = own[number].new_zeros(ctx.shapes[number])
        if there:
            # in place: the buffer was made here or by the next slice's backward pass, and nothing else uses it
            torch._foreach_add_([grad_stack[number][ctx.layers] for number in there], [own[number] for number in there])
        return None, *grad_stack


class _SliceProduct(torch.autograd.Function):
    """Function that multiplies rows by a slice of a stack; it returns the product, the rows and the stack."""

    @staticmethod
    def forward(
        ctx: Any, index: tuple[slice, ...], rows: Tensor, stack: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.index = index
        ctx.save_for_backward(rows, stack)
        ctx.set_materialize_grads(False)
        return _product(rows, stack[index], bias), rows, stack

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_input: Tensor | None, grad_stack: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, grad_input, grad_stack, None
        rows, stack = ctx.saved_tensors
        if grad_stack is None:
            grad_stack = torch.zeros_like(stack)
        # in place as above; transposed, because a layer's own maps have this memory layout
        grad_stack[ctx.index].mT.baddbmm_(grad_output.mT, rows)
        if ctx.needs_input_grad[1]:
            weight = stack[ctx.index].mT
            grad_input = (
                torch.bmm(grad_output, weight) if grad_input is None else grad_input.baddbmm_(grad_output, weight)
            )
        grad_bias = grad_output.sum(dim=1, keepdim=True) if ctx.needs_input_grad[3] else None
        return None, grad_input, grad_stack, grad_bias
