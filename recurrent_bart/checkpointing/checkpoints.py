"""Checkpoints of a run.

RUN/checkpoints/step-00000100/
    engine/              DeepSpeed's shards: weights, optimizer, learning rate scheduler
    process-0.pt ...     state of each rank: random number generators and metrics counted so far
    trainer.json         trainer state: step, best loss, position in the data
    manifest.json        size and checksum of each file
"""

import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine

from recurrent_bart.checkpointing.checkpoint_files import CheckpointFiles, read_tensors
from recurrent_bart.checkpointing.manifest import MANIFEST, has_all_parts, join_parts, problems
from recurrent_bart.checkpointing.process_state import (
    SHARED,
    continue_random_states,
    process_state,
    reseed_random_states,
    sum_metrics,
)
from recurrent_bart.checkpointing.resumed_settings import keep_given_settings
from recurrent_bart.checkpointing.retention import checkpoints_to_delete
from recurrent_bart.checkpointing.universal import reading_universal, write_universal
from recurrent_bart.distributed import barrier, from_first, gather_objects, is_first, only_first, rank, world_size
from recurrent_bart.files import fingerprint, fsync_directory
from recurrent_bart.monitoring.progress import say
from recurrent_bart.run_folder import versions

ENGINE = "engine"


class CheckpointError(OSError):
    """Error that a checkpoint cannot be written. All ranks raise this error, even if only one rank failed."""


@dataclass
class TrainerState:
    """Position of a run in its training.

    Attributes:
        step: Optimizer steps done.
        evaluated_step: Last step that was followed by an evaluation; -1: no step yet.
        best_value: Best value of `best_metric` in an evaluation; None: no value yet.
        best_metric: Metric that chooses the best model.
        best_step: Step of the best model.
        n_worse: Evaluations since `best_step`.
        n_skipped: Steps that were not applied because a gradient was not finite.
        n_skipped_in_row: Skipped steps since the last step that was applied.
        n_documents: Documents read by all ranks.
        order_batch: Documents per step when the run began. The document order is built from this number.
        order_segments: Largest number of segments per batch when the current epoch began, if batches are sized in
            tokens.
        order_seed: Seed of the document order, which is the run's first seed; None: an older checkpoint.
        order_sizes: Segment size, input size and most segments when the run began. The order sorts by these lengths.
        stage: Stage of the curriculum.
        stage_began: Steps done when the stage began.
    """

    step: int = 0
    evaluated_step: int = -1
    best_value: float | None = None
    best_metric: str = "loss"
    best_step: int = 0
    n_worse: int = 0
    n_skipped: int = 0
    n_skipped_in_row: int = 0
    n_documents: int = 0
    order_batch: int = 0
    order_segments: int = 0
    order_seed: int | None = None
    order_sizes: list[int] = field(default_factory=list)
    stage: int = 0
    stage_began: int = 0

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "TrainerState":
        """Build a state from saved fields. Unknown fields are ignored; missing fields get their defaults."""
        if math.isfinite(saved.get("best_loss", math.inf)):
            # name of the field in older checkpoints
            saved = {"best_value": saved["best_loss"]} | saved
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})


@dataclass
class Resumed:
    """Trainer state and metrics from which a run continues. `metrics`: this rank's metrics since the last log line."""

    state: TrainerState = field(default_factory=TrainerState)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Checkpoints:
    """Writer and reader of the checkpoints of a run. All ranks must call each method together.

    Attributes:
        folder: Folder of all checkpoints.
        keep_last: Number of newest checkpoints to keep, besides the checkpoint of the best model.
        keep_every: Also keep checkpoints at multiples of this number of steps; 0: no additional checkpoints.
        in_background: True if training goes on while a checkpoint is written.
        trusts: True to accept a checkpoint that has no manifest.
    """

    folder: Path
    keep_last: int = 2
    keep_every: int = 0
    in_background: bool = False
    trusts: bool = False

    def __post_init__(self) -> None:
        self.files = CheckpointFiles(copies=self.in_background)
        self.writing: Future[None] | None = None
        self.writing_step = 0

    def save(self, engine: DeepSpeedEngine, state: TrainerState, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint of the engine and the trainer state, then delete old checkpoints.

        The folder gets a checkpoint name only when it is complete. `metrics` are the metrics that this rank has counted
        since the last line of the log.

        Raises:
            CheckpointError: This checkpoint, or the previous checkpoint in the background, cannot be written. Older
                checkpoints are intact.
        """
        self.wait()
        draft = self._draft(state.step)
        self._raise_on_all_ranks(self._make_draft(draft), state.step)
        self._gather(engine, state, metrics or {}, draft)
        n_processes, best_step = world_size(), state.best_step

        def publish_if_last() -> None:
            if has_all_parts(draft, n_processes):
                self._publish(draft, n_processes, best_step)

        self.writing_step = state.step
        self.writing = self.files.write(draft, rank(), then=publish_if_last)
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until the current checkpoint is complete. Raise CheckpointError if the checkpoint cannot be written."""
        if self.writing is None:
            return
        error, self.writing = self.writing.exception(), None
        self._raise_on_all_ranks(error, self.writing_step)

    def finish_own(self) -> OSError | None:
        """Wait until this rank has written its part, without the other ranks. Return the error if writing failed."""
        error = None if self.writing is None else self.writing.exception()
        return error if isinstance(error, OSError) else None

    @staticmethod
    def read_state(path: Path | None) -> TrainerState:
        """Return the trainer state that a checkpoint stores, or the state of step 0 if `path` is None."""
        if path is None:
            return TrainerState()
        return TrainerState.of(json.loads((path / "trainer.json").read_text())["state"])

    def load(self, engine: DeepSpeedEngine, path: Path | None = None) -> Resumed:
        """Load a checkpoint, by default the newest undamaged one. Without a checkpoint, return the state of step 0.

        Raises:
            ValueError: All checkpoints are damaged, or the checkpoint belongs to another model.
        """
        path = path or self.find_newest()
        if path is None:
            return Resumed()
        saved = json.loads((path / "trainer.json").read_text())
        only_first(lambda: _check_model(path, saved["written_by"], engine))
        # older checkpoints store their precision only in the names of DeepSpeed's files
        precision = "bf16" if any((path / ENGINE).glob("bf16_*")) else "fp32"
        state, then = TrainerState.of(saved["state"]), {"precision": precision, **saved["written_by"]}
        with keep_given_settings(engine):
            if then == _written_by(engine):
                self._load_shards(engine, path)
            else:
                self._load_universal(engine, path, then["ZeRO stage"])
        return Resumed(state, _continue_process(path, then["processes"], state.step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _draft(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def _make_draft(self, draft: Path) -> OSError | None:
        """Delete drafts (incomplete checkpoints) left by a crash. Make an empty draft. Return rank 0's error."""
        if is_first():
            for leftover in self.folder.glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                (draft / ENGINE).mkdir(parents=True)
            except OSError as error:
                return error
        return None

    def _raise_on_all_ranks(self, error: BaseException | None, step: int) -> None:
        """Raise CheckpointError on all ranks if `error` is given on any rank."""
        errors = gather_objects(None if error is None else f"process {rank()}: {error}")
        met = next((text for text in errors if text), None)
        if met is not None:
            free = shutil.disk_usage(self.folder.parent).free
            raise CheckpointError(
                f"{self._path(step)} cannot be written ({met}; {free:,} bytes of disk space are free); earlier "
                "checkpoints are undamaged"
            ) from error

    def _gather(self, engine: DeepSpeedEngine, state: TrainerState, metrics: dict[str, float], draft: Path) -> None:
        engine.checkpoint_engine = self.files
        # DeepSpeed copies a script that merges shards; RUN/model already holds the merged weights
        engine._copy_recovery_script = lambda folder: None
        engine.save_checkpoint(str(draft), tag=ENGINE, save_latest=False)
        self.files.save(process_state(metrics), draft / f"process-{rank()}.pt")
        if is_first():
            content = {"state": asdict(state), "written_by": _written_by(engine)}
            self.files.save_json(content, draft / "trainer.json")

    def _publish(self, draft: Path, n_processes: int, best_step: int) -> None:
        try:
            # two ranks may be the last to finish; the rank that creates this file renames the draft
            (draft / ".last").touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):
            return
        final = self.folder / draft.name.removeprefix(".").removesuffix(".tmp")
        step = int(final.name.removeprefix("step-"))
        join_parts(draft, n_processes, step=step, versions=versions())
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        draft.rename(final)
        # not before, because another rank could create it again and publish too
        (final / ".last").unlink()
        fsync_directory(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in checkpoints_to_delete(self._steps(), self.keep_last, self.keep_every, best_step):
            _remove(self._path(old))

    def find_newest(self) -> Path | None:
        """Find the newest undamaged checkpoint. Raise ValueError if all checkpoints are damaged.

        Each rank checks part of the files. If there is no checkpoint, return None.
        """
        only_first(self._undo_replacement)
        steps = from_first(self._steps() if is_first() else None)
        damage: list[str] = []
        for step in reversed(steps):
            found = self._problems(self._path(step))
            if not found:
                self._set_aside([newer for newer in steps if newer > step])
                return self._path(step)
            damage.append(f"{self._path(step)}: {found[0]}")
            if is_first():
                say(f"warning: {damage[-1]}; this checkpoint is skipped")
        only_first(lambda: _raise_if_damaged(damage))
        return None

    def _undo_replacement(self) -> None:
        """Restore a step's old checkpoint if a crash interrupted its replacement by a new checkpoint."""
        for replaced in self.folder.glob(".step-*.replaced"):
            final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
            if not final.exists():
                replaced.rename(final)

    def _problems(self, path: Path) -> list[str]:
        """Return the problems that all ranks found. Raise OSError on all ranks if one of them cannot read its files."""
        own, error = [], ""
        if not path.resolve().is_relative_to(self.folder.resolve()) and not self.trusts:
            own = ["the checkpoint is outside the run's folder; add --trust_checkpoint to read it"]
        elif not self.trusts or (path / MANIFEST).exists():
            try:
                own = problems(path, slice(rank(), None, world_size()))
            except OSError as found:
                error = f"{path} cannot be read on process {rank()} ({found}); it may be undamaged: start the run again"
        shares = gather_objects((own, error))
        if errors := [text for _, text in shares if text]:
            raise OSError(errors[0])
        return [problem for share, _ in shares for problem in share]

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Rename damaged checkpoints, so that they do not count among the `keep_last` newest."""
        if is_first():
            for step in steps:
                path = self._path(step)
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        barrier()

    def _load_shards(self, engine: DeepSpeedEngine, path: Path) -> None:
        engine.checkpoint_engine = self.files
        loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE)
        assert loaded, f"DeepSpeed cannot read {path}"

    def _load_universal(self, engine: DeepSpeedEngine, path: Path, stage_then: int) -> None:
        """Load a checkpoint of another world size, ZeRO stage or precision from a temporary converted copy."""
        converted = self.folder / ".universal"
        stage = engine.zero_optimization_stage()

        def convert() -> None:
            shutil.rmtree(converted, ignore_errors=True)
            say(f"resuming   {path.name}, written with a different number of processes, ZeRO stage or precision")
            write_universal(path / ENGINE, converted / ENGINE, stage_then, stage)

        only_first(convert)
        with reading_universal(engine):
            self._load_shards(engine, converted)
        barrier()
        only_first(lambda: shutil.rmtree(converted))


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it. A half-deleted folder then never has a checkpoint's name."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")), ignore_errors=True)


def _raise_if_damaged(damage: Sequence[str]) -> None:
    if damage:
        raise ValueError(f"no checkpoint can be read: {'; '.join(damage)}")


def _written_by(engine: DeepSpeedEngine) -> dict[str, Any]:
    parameters = [
        [name, list(getattr(parameter, "ds_shape", parameter.shape)), parameter.requires_grad]
        for name, parameter in engine.module.named_parameters()
    ]
    return {
        "processes": engine.world_size,
        "ZeRO stage": engine.zero_optimization_stage(),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
        "model": fingerprint(parameters),
    }


def _check_model(path: Path, then: dict[str, Any], engine: DeepSpeedEngine) -> None:
    now = _written_by(engine)
    if then["model"] != now["model"]:
        raise ValueError(
            f"{path}: the checkpoint belongs to a different model: names, shapes or freezing of "
            "parameters differ; use the --model_name_or_path and the version of recurrent_bart of its run"
        )


def _continue_process(path: Path, n_processes: int, step: int) -> dict[str, float]:
    """Restore this rank's random states. Return the metrics that the rank had counted."""
    if n_processes == world_size():
        own = read_tensors(path / f"process-{rank()}.pt")
        continue_random_states(own["random_states"])
        return own["figures"]
    reseed_random_states(step)
    counted = sum_metrics([read_tensors(path / f"process-{number}.pt")["figures"] for number in range(n_processes)])
    # other ranks count only what is the same on all ranks, by which all ranks decide
    return counted if is_first() else {name: counted[name] for name in SHARED}
