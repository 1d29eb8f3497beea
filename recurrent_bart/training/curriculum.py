"""How many segments documents have at each step: few at first, more once those are learnt."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Curriculum:
    """Stages of ever longer documents.

    It holds no position: that is the trainer's, which so resumes it exactly.

    Attributes:
        stages: Most segments of a document in each stage.
        stage_steps: Optimizer steps that end a stage, whatever was reached; 0: none do.
        seed: Of the numbers drawn.

    Raises:
        ValueError: A stage has fewer segments than the one before it.
    """

    stages: tuple[int, ...]
    stage_steps: int
    seed: int

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0] < 1 or list(self.stages) != sorted(self.stages):
            raise ValueError(
                f"curriculum of {', '.join(map(str, self.stages))} segments: none may have fewer than the one before, "
                "from 1 on"
            )

    def longest(self, stage: int) -> int:
        """Most segments of a document in a stage; after the last one, as in it."""
        return self.stages[min(stage, len(self.stages) - 1)]

    def draw(self, stage: int, step: int) -> int:
        """Number of segments of a step, any from 1 to the stage's with the same chance, equal on every process."""
        digest = hashlib.sha256(f"{self.seed} segments {step}".encode()).digest()
        return 1 + int.from_bytes(digest[:8]) % self.longest(stage)

    def is_over(self, stage: int, n_steps: int, is_reached: bool) -> bool:
        """Whether the next stage follows.

        Args:
            stage: The one that is trained.
            n_steps: Optimizer steps that it has had.
            is_reached: What it is trained for was reached.
        """
        is_last = stage >= len(self.stages) - 1
        return not is_last and (is_reached or 0 < self.stage_steps <= n_steps)


def parse_stages(text: str) -> tuple[int, ...]:
    """Stages written as `1,2,4,8`.

    Raises:
        ValueError: These are no numbers.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"--curriculum {text}: numbers of segments are needed, such as 1,2,4,8") from error
