"""Curriculum of document lengths: few segments at first, more in later stages."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Curriculum:
    """Stages of training with a growing limit of segments per document. `TrainerState` holds the current stage.

    Attributes:
        stages: Largest number of segments per document in each stage.
        stage_steps: Optimizer steps after which a stage ends in any case; 0: no limit.
        seed: Seed of the numbers that `draw` returns.

    Raises:
        ValueError: A stage has fewer segments than the stage before.
    """

    stages: tuple[int, ...]
    stage_steps: int
    seed: int

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0] < 1 or list(self.stages) != sorted(self.stages):
            raise ValueError(
                f"--curriculum {','.join(map(str, self.stages))}: must start with at least 1, and no number may be "
                "lower than the previous number"
            )

    def longest(self, stage: int) -> int:
        """Return a stage's limit of segments per document. After the last stage, the last limit stays."""
        return self.stages[min(stage, len(self.stages) - 1)]

    def draw(self, stage: int, step: int) -> int:
        """Draw a step's number of segments per document, from 1 to the stage's limit. All ranks draw the same."""
        digest = hashlib.sha256(f"{self.seed} segments {step}".encode()).digest()
        return 1 + int.from_bytes(digest[:8]) % self.longest(stage)

    def is_over(self, stage: int, n_steps: int, is_reached: bool) -> bool:
        """Return True if the current stage is over.

        `n_steps` counts the optimizer steps of this stage. `is_reached` is True if the training loss reached its
        threshold.
        """
        is_last = stage >= len(self.stages) - 1
        return not is_last and (is_reached or 0 < self.stage_steps <= n_steps)


def parse_stages(text: str) -> tuple[int, ...]:
    """Parse stages that are written as `1,2,4,8`. Raise ValueError if they are not integers."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"--curriculum {text}: must be whole numbers, for example 1,2,4,8") from error
