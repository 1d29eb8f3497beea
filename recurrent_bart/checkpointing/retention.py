"""Choice of the checkpoints that a run keeps."""

from collections.abc import Sequence


def checkpoints_to_delete(steps: Sequence[int], keep_last: int, keep_every: int, best_step: int) -> list[int]:
    """Return the steps whose checkpoints can be deleted. `steps` are the steps of all checkpoints in ascending order.

    These checkpoints stay: the `keep_last` newest, all multiples of `keep_every` (0: none), and `best_step`, the
    step of the best model.
    """
    return [step for step in steps[:-keep_last] if step != best_step and not (keep_every and step % keep_every == 0)]
