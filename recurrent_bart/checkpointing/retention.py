"""Choice of the checkpoints that a run keeps."""

from collections.abc import Sequence


def checkpoints_to_delete(steps: Sequence[int], keep_last: int, keep_every: int, best_step: int) -> list[int]:
    """Return the steps whose checkpoints can be deleted.

    Args:
        steps: Steps of all whole checkpoints in ascending order, including the newest.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Keep the checkpoints at multiples of this number of steps; 0: none.
        best_step: Step with the lowest validation loss; its checkpoint is kept.
    """
    return [step for step in steps[:-keep_last] if step != best_step and not (keep_every and step % keep_every == 0)]
