"""How many segments documents have at each step: few at first, more once those are learnt."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Curriculum:
    """Stages of ever longer documents.

    It holds no position: that is the trainer's, which so resumes it exactly.

    Attributes:
        stages: Most segments of a document in each stage.
        threshold: Accuracy that ends a stage; None: none does.
        stage_steps: Optimizer steps that end it in any case; 0: none do.
        seed: Of the numbers drawn.

    Raises:
        ValueError: Stages do not grow, or no stage would ever end.
    """

    stages: tuple[int, ...]
    threshold: float | None
    stage_steps: int
    seed: int

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0] < 1 or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages of {', '.join(map(str, self.stages))} segments: each must have more, from 1 on")
        if len(self.stages) > 1 and self.threshold is None and not self.stage_steps:
            raise ValueError("a curriculum of several stages needs an accuracy or a number of steps that ends one")

    def draw(self, stage: int, step: int) -> int:
        """Number of segments of a step, any from 1 to the stage's with the same chance, equal on every process."""
        digest = hashlib.sha256(f"{self.seed} segments {step}".encode()).digest()
        return 1 + int.from_bytes(digest[:8]) % self.stages[stage]

    def is_over(self, stage: int, n_steps: int, accuracy: float | None = None) -> bool:
        """Whether the next stage follows.

        Args:
            stage: The one that is trained.
            n_steps: Optimizer steps that it has had.
            accuracy: What was reached on its longest documents, if that was measured just now.
        """
        if stage == len(self.stages) - 1:
            return False
        is_reached = self.threshold is not None and accuracy is not None and accuracy >= self.threshold
        return is_reached or bool(self.stage_steps and n_steps >= self.stage_steps)


def parse_stages(text: str) -> tuple[int, ...]:
    """Stages written as `1,2,4,8`.

    Raises:
        ValueError: These are no numbers.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"--curriculum {text}: numbers of segments are needed, such as 1,2,4,8") from error
