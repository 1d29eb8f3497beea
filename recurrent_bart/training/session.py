"""Session of a run: its evaluations, checkpoints and logs; `open_session` builds it."""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Self

import torch
from deepspeed import DeepSpeedEngine

from recurrent_bart.checkpointing.checkpoints import Checkpoints, Resumed, TrainerState
from recurrent_bart.data.batches import Batch, DocumentOrder
from recurrent_bart.data.rows import PRETRAINING_TASKS
from recurrent_bart.data.tokenizer import save_tokenizer
from recurrent_bart.distributed import (
    from_first,
    is_first,
    only_first,
    set_timeout,
    stop_all,
)
from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.evaluation.evaluator import Evaluator, Generation, Sample
from recurrent_bart.evaluation.mean_scores import mean_scores
from recurrent_bart.evaluation.predictions import Prediction, write_predictions
from recurrent_bart.evaluation.scoring import score_samples
from recurrent_bart.files import atomic_directory, atomic_write
from recurrent_bart.model.flops import peak_flops
from recurrent_bart.monitoring.best_metric import best_evaluation, describe_best, is_better, logged_value
from recurrent_bart.monitoring.progress import ProgressDisplay, say
from recurrent_bart.monitoring.rank_metrics import RankTopology
from recurrent_bart.monitoring.timing import Stopwatch
from recurrent_bart.report.curves import draw_curves
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.adapters import merged
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.description import describe, generated_length, oracle_at, resolved_settings
from recurrent_bart.training.document_order import store_data_position
from recurrent_bart.training.environment import Environment, is_batch_job
from recurrent_bart.training.lifecycle.exit_codes import ExitCode, Outcome
from recurrent_bart.training.lifecycle.faults import explain_write_errors
from recurrent_bart.training.lifecycle.interruption import Interrupted, Interruption
from recurrent_bart.training.lifecycle.run_lock import RunLock
from recurrent_bart.training.lifecycle.spikes import SpikeWatch
from recurrent_bart.training.lifecycle.stall import StallWatch
from recurrent_bart.training.model_card import note_step, noted_step, write_model_card
from recurrent_bart.training.preparation import Documents, Preparation
from recurrent_bart.training.probing import probe_recurrence
from recurrent_bart.training.resumed_flags import remeasured
from recurrent_bart.training.run_length import reason_to_end
from recurrent_bart.training.step_metrics import StepMetrics
from recurrent_bart.training.tracking import start_trackers
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.training_batches import TrainingBatches
from recurrent_bart.training.zero.engine import full_state_dict, gathered_for_evaluation, save_model

# number of samples written at each evaluation
N_SAMPLES = 5
STOP_FILE = "stop"
OUTCOME_FILE = "outcome.json"
# a warning is printed after this time without a step or an evaluation
STALL_SECONDS = 600.0


def _open_folder(prepared: Preparation, resolved: dict[str, Any], state: TrainerState) -> None:
    folder, is_resumed = prepared.folder, prepared.flags["run"]["resume"] is not None
    # files of the previous start are deleted only now, when the run can no longer be refused
    for name in (STOP_FILE, OUTCOME_FILE):
        (folder.path / name).unlink(missing_ok=True)
    # a resumed run has read it from there
    if not is_resumed:
        with atomic_directory(folder.tokenizer, replaces=True) as draft:
            save_tokenizer(prepared.tokenizer, draft)
    # a folder with config.json can be resumed, so it is written last
    folder.write_config(
        arguments=prepared.flags,
        resolved=resolved,
        model=prepared.config.to_dict(),
        deepspeed=prepared.deepspeed,
        documents=prepared.documents(),
        resumes=[*prepared.resumes, {"step": state.step, "changes": prepared.changes}] if is_resumed else [],
    )
    folder.forget_after(state.step, state.evaluated_step)


def _has_model_of(folder: RunFolder, step: int) -> bool:
    """Return True if RUN/model was saved after a step, or by an older version, which did not note the step."""
    return folder.model.is_dir() and noted_step(folder.model) in (None, step)


class Session:
    """Work of a run between its steps: evaluation, checkpoints and logging. Each rank has one session."""

    def __init__(
        self,
        arguments: Arguments,
        environment: Environment,
        prepared: Preparation,
        engine: DeepSpeedEngine,
        checkpoints: Checkpoints,
        resumed: Resumed,
        order: DocumentOrder,
        lock: RunLock,
    ):
        self.arguments, self.environment, self.prepared = arguments, environment, prepared
        self.engine, self.checkpoints, self.resumed, self.lock = engine, checkpoints, resumed, lock
        self.state = state = resumed.state
        self.order = order
        resolved = resolved_settings(arguments, prepared.config, order)
        self._forget_later_model()
        # the folder is changed only after the last check that can refuse the run
        only_first(lambda: _open_folder(prepared, resolved, state))
        self.folder = prepared.folder
        self.display = ProgressDisplay(state.step, arguments.run.max_steps, is_plain=is_batch_job())
        peak = peak_flops(environment.device, engine.bfloat16_enabled())
        self.topology = RankTopology.gather(environment.local_rank, peak)
        self.trackers = start_trackers(arguments.tracking, environment, self.folder, self.topology)
        self.stall_watch = StallWatch(STALL_SECONDS, self._report_stall)
        self.interruption = Interruption(self.folder.path / STOP_FILE, arguments.run.max_minutes, self._announce_stop)
        self.evaluator = self._evaluator(prepared.splits["validation"])
        self.spikes = SpikeWatch()
        self.saved = (state.step, state.evaluated_step)
        # step of the model in RUN/model
        self.model_step = None if state.best_value is None else state.best_step
        self._choose_metric()

    def __enter__(self) -> Self:
        if is_first():
            self.display.__enter__()
            if self.state.step:
                self.display.say(f"resumed    after step {self.state.step}")
            for line in describe(self.arguments, self.order, self.environment, self.prepared, self.engine):
                self.display.say(line)
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        outcome = Outcome.of(error, self.state.step)
        self._finish_trackers(outcome)
        if is_first():
            self.display.__exit__()
            self.lock.renew()
        if is_first() and not self.lock.is_lost:
            # the run may end because the disk is full
            with contextlib.suppress(OSError):
                atomic_write(self.folder.path / OUTCOME_FILE, json.dumps(outcome.fields()) + "\n")
        self.lock.release()

    def train(self) -> None:
        """Run the training loop."""
        documents, run = self.prepared.splits["train"], self.arguments.run
        batches = contextlib.closing(TrainingBatches(documents, self.order, run, self.environment, self.state))
        with self.interruption.watching(), self.stall_watch, batches as read:
            try:
                # the end of a resumed run may not have been recorded
                if reason_to_end(run, self.state) is None:
                    self._trainer(read).train()
                self.checkpoints.wait()
            except Interrupted as reason:
                self.checkpoints.wait()
                self.display.say(f"stopped    after step {self.state.step}: {reason}")
                raise
            finally:
                # other ranks may have ended already
                error = None if self.lock.is_lost else self.checkpoints.finish_own()
                if error is not None:
                    self.display.say(f"warning: the last checkpoint cannot be written: {error}")
                self._announce_saved_model()

    def _trainer(self, batches: Iterator[Batch]) -> Trainer:
        return Trainer(
            engine=self.engine,
            batches=batches,
            run=self.arguments.run,
            state=self.state,
            on_log=self.log,
            on_evaluation=self.evaluate,
            on_save=self.save,
            on_step=self.step,
            on_skip=self.skip,
            oracle=functools.partial(oracle_at, self.arguments.run, self.order),
            interruption=self.interruption,
            topology=self.topology,
            watch=Stopwatch(self.environment.device),
            curriculum=self.arguments.run.build_curriculum(),
            step_metrics=StepMetrics.of(self.resumed.metrics),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Log and display the metrics of the last steps."""
        train = self.prepared.splits["train"]
        self.trackers.log({**record, "n_cut_documents": train.plan.n_cut, "n_bad_documents": len(train.skipped)})
        self.display.show(record)
        self.watch(record)

    def watch(self, record: dict[str, Any]) -> None:
        """Warn of a loss spike. Raise ValueError after `--max_loss_spikes` warnings in a row."""
        warning = self.spikes.warning(record)
        if warning:
            self.trackers.alert("loss is high", warning)
            self.display.say(f"warning: {warning}")
        if warning and self.spikes.n_in_row == self.arguments.run.max_loss_spikes:
            stop_all(f"{warning}; lower --learning_rate, then continue with --resume or start a new run")

    def step(self, step: int) -> None:
        """Report a finished step. The first step takes longest, so later steps get a shorter timeout."""
        self.lock.check()
        self.stall_watch.beat()
        self.display.step(step)
        set_timeout(timedelta(seconds=self.arguments.run.step_timeout_seconds))

    def wait_longer(self) -> None:
        """Set the long timeout of collectives, which evaluations and checkpoints need."""
        self.lock.renew()
        self.lock.check()
        set_timeout(timedelta(minutes=self.arguments.run.timeout_minutes))

    def skip(self, reason: str) -> None:
        """Log the reason why a step was not applied."""
        self.trackers.log({"step": self.state.step, "skipped": reason})
        self.trackers.alert("step skipped", reason)
        self.display.say(f"warning: {reason}")

    def _report_stall(self) -> None:
        text = f"no step for {STALL_SECONDS / 60:.0f} minutes after step {self.state.step}"
        self.trackers.alert("run stalls", text)
        self.display.say(f"warning: {text}")

    def _announce_stop(self, name: str) -> None:
        self.display.say(f"stopping   {name} received: finishing this step (or batch of an evaluation), then saving")

    def _forget_later_model(self) -> None:
        """Have the next evaluation write RUN/model if it is missing or not that of the best step in the checkpoint."""
        state, folder = self.state, self.prepared.folder
        if state.best_value is not None and from_first(is_first() and not _has_model_of(folder, state.best_step)):
            state.best_value = None
            if is_first():
                say(
                    f"warning: {folder.model} is not the model of step {state.best_step}; the next evaluation writes it"
                )

    def _choose_metric(self) -> None:
        """Set `--metric_for_best_model`. A resumed run compares with the value that the saved model has in the log."""
        state, metric = self.state, self.arguments.run.metric_for_best_model
        if remeasured(self.prepared.changes, metric):
            state.n_worse = 0
        if state.best_metric == metric:
            return
        state.best_metric, state.n_worse = metric, 0
        # without a value or a saved model, there is nothing to compare with
        is_known = state.best_value is not None and self.folder.model.is_dir()
        records = self.folder.read_metrics() if is_first() and is_known else []
        of_saved_model = [record for record in records if record["step"] == state.best_step]
        state.best_value = from_first(logged_value(best_evaluation(of_saved_model, metric), metric))

    def _announce_saved_model(self) -> None:
        """Print the step whose model is in RUN/model. This step may be earlier than the last step."""
        state = self.state
        if self.model_step is not None:
            known = "" if state.best_value is None else f": {describe_best(state.best_metric, state.best_value)}"
            self.display.say(f"saved      {self.folder.model}, the model after step {self.model_step}{known}")

    def _finish_trackers(self, outcome: Outcome) -> None:
        code = ExitCode(outcome.code)
        self.trackers.alert(f"run {code.name.lower()}", f"after step {outcome.step}  {outcome.reason}".rstrip())
        for line in self.trackers.finish(is_success=code in (ExitCode.DONE, ExitCode.STOPPED)):
            self.display.say(f"upload     {line}")

    def evaluate(self) -> bool:
        """Compute validation loss and ROUGE, and save the best model. Return True if the run must stop early."""
        self.wait_longer()
        state = self.state
        samples: list[Sample] = []
        started = time.perf_counter()
        with gathered_for_evaluation(self.engine) as model:
            loss = self.evaluator.loss(model)
            # an untrained model generates only noise; a pretraining task has no reference texts
            if state.step and self.arguments.data.task not in PRETRAINING_TASKS:
                with self._own_random_numbers():
                    samples = self.evaluator.summarise(model, self._generation())
            recurrence = probe_recurrence(model, self.evaluator)
        record: dict[str, Any] = {"step": state.step, "validation_loss": loss, **recurrence}
        predictions = score_samples(self.evaluator, samples)
        scores = mean_scores(predictions)
        record |= {name: value.mean for name, value in scores.items()}
        record["evaluation_seconds"] = time.perf_counter() - started
        value = logged_value(record, state.best_metric)
        is_best = is_better(state.best_metric, value, state.best_value)
        if is_best:
            state.best_value, state.best_step, state.n_worse = value, state.step, 0
        elif value is not None:
            state.n_worse += 1
        self.stall_watch.beat()
        self.trackers.log(from_first(record))
        self.display.show(record)
        if is_first():
            with explain_write_errors(self.folder.samples_file):
                self._write_evaluation(record, samples)
        if is_best:
            self._export(loss, scores, predictions)
            self.model_step = state.step
        patience = self.arguments.run.patience
        return bool(patience) and state.n_worse >= patience

    def save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint, unless it exists already or no step is done."""
        state = self.state
        if state.step and (state.step, state.evaluated_step) != self.saved:
            self.wait_longer()
            self.stall_watch.beat()
            store_data_position(self.order, state)
            started = time.perf_counter()
            self.checkpoints.save(self.engine, state, metrics)
            self.trackers.log(from_first({"step": state.step, "checkpoint_seconds": time.perf_counter() - started}))
            self.saved = (state.step, state.evaluated_step)

    def _write_evaluation(self, record: dict[str, Any], samples: list[Any]) -> None:
        if samples:
            self.folder.append_samples(f"Step {record['step']}", samples[:N_SAMPLES])
        draw_curves(self.folder.read_metrics(), self.folder.curves_file)
        scores = "  ".join(f"{name} {value:.2f}" for name, value in record.items() if name.startswith("rouge"))
        self.display.say(f"step {record['step']}: validation loss {record['validation_loss']:.4f}  {scores}".rstrip())

    def _export(self, loss: float, scores: Mapping[str, Interval], predictions: list[Prediction]) -> None:
        """Write the model with its card, and the texts that it generated in its evaluation."""
        weights = full_state_dict(self.engine)
        if is_first():
            with explain_write_errors(self.folder.model), atomic_directory(self.folder.model, replaces=True) as draft:
                save_model(self.engine, merged(weights, self.arguments.model), draft)
                save_tokenizer(self.prepared.tokenizer, draft)
                note_step(draft, self.state.step)
                write_model_card(draft, self.folder.read_config(), self.state.step, loss, scores)
        if is_first() and predictions:
            with explain_write_errors(self.folder.predictions_file):
                write_predictions(self.folder.predictions_file, predictions)

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw texts from the seed and the step, so that a repeated evaluation draws the same."""
        device, seed = self.environment.device, self.arguments.run.seed
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            digest = hashlib.sha256(f"{seed} evaluation {self.state.step} {self.environment.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
            yield

    def _generation(self) -> Generation:
        run = self.arguments.run
        return Generation(generated_length(run, self.prepared), n_documents=run.eval_documents)

    def _continue_evaluation(self) -> None:
        self.stall_watch.beat()
        self.interruption.ask(self.environment.device)

    def _evaluator(self, documents: Documents) -> Evaluator:
        run = self.arguments.run
        return Evaluator(
            documents.corpus,
            documents.plan,
            documents.collator,
            self.prepared.tokenizer,
            run.per_device_eval_batch_size or run.per_device_train_batch_size,
            self.environment.device,
            on_batch=self._continue_evaluation,
        )
