"""Tensors of checkpoints, for comparison."""

import torch

from recurrent_bart.checkpointing.checkpoint_files import read_tensors

# a placeholder that equals no saved tensor
NOTHING = torch.empty(0, 0, 0)


def saved_tensors(checkpoint):
    """Return all tensors of a checkpoint by file and by path inside the file."""
    return {
        f"{file.relative_to(checkpoint)}{path}": tensor
        for file in sorted(checkpoint.rglob("*.pt"))
        for path, tensor in _tensors(read_tensors(file))
    }


def differing(found, expected):
    """Return the names of tensors that are not bit-identical."""
    return [
        name for name in {**expected, **found} if not torch.equal(found.get(name, NOTHING), expected.get(name, NOTHING))
    ]


def _tensors(item, path=""):
    if torch.is_tensor(item):
        yield path, item
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from _tensors(value, f"{path}/{key}")
    elif isinstance(item, (list, tuple)):
        for place, value in enumerate(item):
            yield from _tensors(value, f"{path}/{place}")
