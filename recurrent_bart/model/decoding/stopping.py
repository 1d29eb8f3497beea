"""Criterion that ends a generation from outside, in Hugging Face's loop and in this package's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopWhen(StoppingCriteria):
    """Criterion that ends a generation once a function returns True; another thread may decide it."""

    def __init__(self, is_over: Callable[[], bool]):
        self.is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return True for all texts of the batch, or False for all."""
        return torch.full((len(input_ids),), self.is_over(), dtype=torch.bool, device=input_ids.device)


def is_stopped(stopping_criteria: Iterable[Any]) -> bool:
    """Return True if one of the criteria that another thread decides ends the generation."""
    return any(isinstance(criterion, StopWhen) and criterion.is_over() for criterion in stopping_criteria)
