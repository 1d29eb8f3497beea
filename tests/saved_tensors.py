"""What a checkpoint holds, to be compared."""

import torch

from recurrent_bart.checkpointing.checkpoint_files import read_tensors

# equal to no tensor that is saved
NOTHING = torch.empty(0, 0, 0)


def saved_tensors(checkpoint):
    """All tensors of its files, by file and where they stand in it."""
    return {
        f"{file.relative_to(checkpoint)}{path}": tensor
        for file in sorted(checkpoint.rglob("*.pt"))
        for path, tensor in _tensors(read_tensors(file))
    }


def differing(found, expected):
    """Names of those that are not the same bits."""
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
