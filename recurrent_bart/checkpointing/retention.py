"""Which checkpoints of a run are kept."""

from collections.abc import Sequence


def checkpoints_to_delete(steps: Sequence[int], keep_last: int, keep_every: int, best_step: int) -> list[int]:
    """Those that may go now.

    Args:
        steps: All that are whole, in ascending order; the last has just become so.
        keep_last: How many of the newest stay.
        keep_every: Those at its multiples stay; 0: none for that.
        best_step: The one of the lowest validation loss stays.
    """
    return [step for step in steps[:-keep_last] if step != best_step and not (keep_every and step % keep_every == 0)]
