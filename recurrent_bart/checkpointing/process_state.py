"""What each process has for itself: random states, of which DeepSpeed keeps none, and what it has counted."""

from collections.abc import Sequence
from typing import Any

import torch


def process_state(figures: dict[str, float]) -> dict[str, Any]:
    """What one process has now.

    Args:
        figures: What it has counted since the last line of the log.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {"random_states": states, "figures": figures}


def continue_random_states(states: dict[str, torch.Tensor]) -> None:
    """Draw on from where a process was."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def reseed_random_states(step: int) -> None:
    """For a process that there was not: what it draws is not what it drew at the beginning of the run."""
    torch.manual_seed(torch.initial_seed() + 1_000_003 * step)


def summed(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """What several processes have counted, for one to go on from. They took steps and time together."""
    together = {"n_steps", "seconds"}
    return {name: figures[0][name] if name in together else sum(one[name] for one in figures) for name in figures[0]}
