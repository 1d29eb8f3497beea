"""What a run is continued from.

RUN/checkpoints/step-00000100/
    engine/              DeepSpeed's shards: weights, optimizer, learning rate schedule
    rng-0.pt ...         random states, one file a process: DeepSpeed keeps the first one's alone
    trainer.json         step, best so far
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine

from recurrent_bart.distributed import barrier, is_first, only_first, rank

ENGINE = "engine"


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        best_loss: Lowest validation loss so far.
        best_step: Step that had it.
        n_worse: Evaluations since then.
        n_skipped: Steps not applied, for a gradient was not finite.
    """

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    n_worse: int = 0
    n_skipped: int = 0


class Checkpoints:
    """Writes, finds and reads the checkpoints of a run. All processes call every method together."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def save(self, engine: DeepSpeedEngine, state: TrainerState) -> None:
        """Write a checkpoint under a name of its own once it is complete, and remove the oldest."""
        final = self._path(state.step)
        draft = final.with_name(f".{final.name}.tmp")
        only_first(lambda: _make_empty(draft))
        barrier()
        engine.save_checkpoint(str(draft), tag=ENGINE, save_latest=False)
        torch.save(_random_states(), draft / f"rng-{rank()}.pt")
        barrier()
        if is_first():
            (draft / "trainer.json").write_text(json.dumps(asdict(state)))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            self._remove_old(state.best_step)
        barrier()

    def load(self, engine: DeepSpeedEngine) -> TrainerState:
        """Continue from the newest checkpoint.

        Raises:
            ValueError: There is none, or it was written by another number of processes.
        """
        steps = self._steps()
        if not steps:
            raise ValueError(f"--resume: no checkpoint in {self.folder}")
        path = self._path(steps[-1])
        n_written = len(list(path.glob("rng-*.pt")))
        if n_written != engine.world_size:
            raise ValueError(f"{path}: written by {n_written} processes, there are {engine.world_size} now")
        engine.load_checkpoint(str(path), tag=ENGINE)
        _set_random_states(torch.load(path / f"rng-{rank()}.pt", weights_only=True))
        return TrainerState(**json.loads((path / "trainer.json").read_text()))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def _remove_old(self, best_step: int) -> None:
        for step in self._steps()[: -self.keep_last]:
            if step != best_step:
                shutil.rmtree(self._path(step), ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
