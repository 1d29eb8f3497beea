"""Counters of calls."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count_calls(monkeypatch, owner, name):
    """Return a list that grows by one with each call of a function of a module or a class; the function still runs."""
    counted, original = [], getattr(owner, name)

    def counting(*arguments, **options):
        counted.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return counted


class OperationsCalled(TorchDispatchMode):
    """Context that collects the names of operations that return new tensors, not views.

    Args:
        sizes: Allowed numbers of elements of the tensors; None allows any.
    """

    def __init__(self, sizes=None):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if torch.is_tensor(result) and not operation.is_view and (not self.sizes or result.numel() in self.sizes):
            self.found.append(operation.__name__)
        return result
