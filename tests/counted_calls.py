"""Whether something is called."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count_calls(monkeypatch, owner, name):
    """A list that grows by one with each call of a function of a module or a class, which still does its work."""
    counted, original = [], getattr(owner, name)

    def counting(*arguments, **options):
        counted.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return counted


class OperationsCalled(TorchDispatchMode):
    """Names of operations that give tensors and no views of them, while it is entered.

    Args:
        sizes: Numbers of elements that the tensors may have; None: any.
    """

    def __init__(self, sizes=None):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if torch.is_tensor(result) and not operation.is_view and (not self.sizes or result.numel() in self.sizes):
            self.found.append(operation.__name__)
        return result
