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
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from recurrent_bart.data.corpus import fingerprint
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
        n_skipped_in_row: Those since the last one that was applied.
    """

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    n_worse: int = 0
    n_skipped: int = 0
    n_skipped_in_row: int = 0


class Checkpoints:
    """Writes, finds and reads the checkpoints of a run. All processes call every method together."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def save(self, engine: DeepSpeedEngine, state: TrainerState) -> None:
        """Write a checkpoint, under its name only once it is complete, and remove the oldest."""
        final = self._path(state.step)
        draft = final.with_name(f".{final.name}.tmp")
        only_first(lambda: self._make_room(draft))
        engine.save_checkpoint(str(draft), tag=ENGINE, save_latest=False)
        torch.save(_random_states(), draft / f"rng-{rank()}.pt")
        barrier()
        if is_first():
            written = {"state": asdict(state), "written_by": _written_by(engine), "bytes": _bytes(draft)}
            (draft / "trainer.json").write_text(json.dumps(written))
            _remove(final)
            draft.rename(final)
            self._remove_old(state.best_step)
        barrier()

    def load(self, engine: DeepSpeedEngine) -> TrainerState:
        """Continue from the newest checkpoint; from the beginning if the run ended before its first.

        Raises:
            ValueError: It cannot be read, or was written by another number of processes, another ZeRO stage or another
                model.
        """
        steps = self._steps()
        if not steps:
            return TrainerState()
        path = self._path(steps[-1])
        only_first(lambda: _check(path, engine))
        settings = _settings(engine)
        loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE)
        assert loaded, f"DeepSpeed cannot read {path}"
        _restore(engine, settings)
        _set_random_states(torch.load(path / f"rng-{rank()}.pt", weights_only=True))
        return TrainerState(**_read(path)["state"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def _make_room(self, draft: Path) -> None:
        """Make an empty folder; drafts that a crash left behind go."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir(parents=True)

    def _remove_old(self, best_step: int) -> None:
        for step in self._steps()[: -self.keep_last]:
            if step != best_step:
                _remove(self._path(step))


def _remove(checkpoint: Path) -> None:
    """Take its name away first: one that is half removed is no checkpoint."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")), ignore_errors=True)


def _written_by(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What must be the same where a checkpoint is read, under the names it has in messages."""
    parameters = [
        [name, list(getattr(parameter, "ds_shape", parameter.shape)), parameter.requires_grad]
        for name, parameter in engine.module.named_parameters()
    ]
    return {
        "processes": engine.world_size,
        "ZeRO stage": engine.zero_optimization_stage(),
        "model": fingerprint(parameters),
    }


def _bytes(checkpoint: Path) -> dict[str, int]:
    """Size of each file but the record itself."""
    files = [file for file in checkpoint.rglob("*.pt") if file.is_file()]
    return {str(file.relative_to(checkpoint)): file.stat().st_size for file in files}


def _check(path: Path, engine: DeepSpeedEngine) -> None:
    record, found = _read(path), _bytes(path)
    for name, size in record["bytes"].items():
        if found.get(name) != size:
            raise ValueError(f"{path}: {name} is incomplete; remove the checkpoint to go on from the one before")
    for name, now in _written_by(engine).items():
        then = record["written_by"][name]
        if then != now:
            raise ValueError(
                f"{path}: cannot be continued with another number of processes, ZeRO stage or model; "
                f"{name}: {then} then, {now} now"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "trainer.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from error


def _settings(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What this run's flags say and a checkpoint would silently overrule with those of the time it was written."""
    scheduler = engine.lr_scheduler
    return {
        "clip_grad": engine.optimizer.clip_grad,
        "weight_decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "base_lrs": scheduler and scheduler.base_lrs,
    }


def _restore(engine: DeepSpeedEngine, settings: dict[str, Any]) -> None:
    engine.optimizer.clip_grad = settings["clip_grad"]
    for group, decay in zip(engine.optimizer.param_groups, settings["weight_decay"], strict=True):
        group["weight_decay"] = decay
    scheduler = engine.lr_scheduler
    if scheduler:
        scheduler.base_lrs = settings["base_lrs"]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(engine.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
            group["lr"] = base * factor


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
