"""State of each rank that DeepSpeed does not save: random number generators and counted metrics."""

from collections.abc import Sequence
from typing import Any

import torch

# metrics that are the same on all ranks
SHARED = ("n_steps", "seconds")


def process_state(metrics: dict[str, float]) -> dict[str, Any]:
    """Return the random states of this rank, with its metrics since the last log line (`metrics`)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {"random_states": states, "figures": metrics}


def continue_random_states(states: dict[str, torch.Tensor]) -> None:
    """Restore the states of the CPU and CUDA random number generators."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def reseed_random_states(step: int) -> None:
    """Seed the generators of a rank without saved state. The new seed depends on the step."""
    torch.manual_seed(torch.initial_seed() + 1_000_003 * step)


def sum_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum metrics over ranks, except `n_steps` and `seconds`, which are the same on all ranks."""
    return {name: metrics[0][name] if name in SHARED else sum(one[name] for one in metrics) for name in metrics[0]}
