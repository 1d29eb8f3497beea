"""A run from its arguments to its last evaluation: what `launch/train.py` calls."""

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch.utils.data import DataLoader, Dataset

from recurrent_bart.data.batches import Batch, BatchOrder, RankBatches
from recurrent_bart.data.corpus import half_written
from recurrent_bart.data.tokenizer import save_tokenizer
from recurrent_bart.distributed import first_then_all, from_first, is_first, only_first
from recurrent_bart.evaluation.evaluator import Evaluator, Generation, score
from recurrent_bart.monitoring.curves import draw_curves
from recurrent_bart.monitoring.progress import ProgressDisplay
from recurrent_bart.training.adapters import choose_trained, merged
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.checkpoints import Checkpoints, TrainerState
from recurrent_bart.training.description import batch_order, describe, learning_rates, oracle_at
from recurrent_bart.training.engine import build_engine, full_state_dict, gathered_for_evaluation, save_model
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.model_building import build_model
from recurrent_bart.training.optimization import build_optimizer, build_scheduler
from recurrent_bart.training.preparation import Documents, Preparation, default_output_dir, prepare
from recurrent_bart.training.trainer import Trainer

# samples shown at each evaluation
N_SAMPLES = 5


def run_experiment(arguments: Arguments, environment: Environment) -> Path:
    """Train, evaluate and save; returns the run folder.

    Raises:
        ValueError: Something is wrong with the arguments or the documents.
    """
    run = arguments.run
    run.output_dir = from_first(run.output_dir or default_output_dir(arguments))
    prepared = first_then_all(lambda: prepare(arguments, environment))
    model = build_model(arguments.model, prepared.config, run.seed)
    choose_trained(model, arguments.model)
    rates = learning_rates(arguments, prepared.config)
    optimizer = build_optimizer(model, rates, run.weight_decay)
    engine = build_engine(model, optimizer, build_scheduler(optimizer, run), prepared.deepspeed)
    # from here on processes differ in their dropout
    torch.manual_seed(run.seed + 1 + environment.rank)
    model.set_gradient_checkpointing(run.gradient_checkpointing)
    checkpoints = Checkpoints(prepared.folder.checkpoints, run.keep_last)
    state = checkpoints.load(engine) if run.resume else TrainerState()
    only_first(lambda: _open_folder(prepared, arguments, state.step))
    with Session(arguments, environment, prepared, engine, checkpoints, state) as session:
        session.train()
    return prepared.folder.path


def _open_folder(prepared: Preparation, arguments: Arguments, step: int) -> None:
    folder = prepared.folder
    folder.create()
    save_tokenizer(prepared.tokenizer, folder.tokenizer)
    # what makes it a run that can be resumed, so it comes last
    folder.write_config(arguments=asdict(arguments), model=prepared.config.to_dict(), deepspeed=prepared.deepspeed)
    # a run that begins at step 0 evaluates there itself
    folder.forget_after(step or -1)


class Session:
    """What happens beside the steps: evaluation, checkpoints, the log. All processes have one each."""

    def __init__(
        self,
        arguments: Arguments,
        environment: Environment,
        prepared: Preparation,
        engine: DeepSpeedEngine,
        checkpoints: Checkpoints,
        state: TrainerState,
    ):
        self.arguments, self.environment, self.prepared = arguments, environment, prepared
        self.engine, self.checkpoints, self.state = engine, checkpoints, state
        self.folder = prepared.folder
        self.display = ProgressDisplay(state.step, arguments.run.max_steps)
        self.evaluator = self._evaluator(prepared.splits["validation"])

    def __enter__(self) -> "Session":
        if is_first():
            self.display.__enter__()
            if self.state.step:
                self.display.say(f"resumed    after step {self.state.step}")
            for line in describe(self.arguments, self.environment, self.prepared, self.engine):
                self.display.say(line)
        return self

    def __exit__(self, *_: Any) -> None:
        if is_first():
            self.display.__exit__()

    def train(self) -> None:
        """Run the loop."""
        order = batch_order(self.arguments, self.prepared, self.environment.world_size)
        Trainer(
            engine=self.engine,
            batches=self._batches(order),
            run=self.arguments.run,
            state=self.state,
            on_log=self.log,
            on_evaluation=self.evaluate,
            on_step=self.display.step,
            on_skip=self.skip,
            oracle=functools.partial(oracle_at, self.arguments.run, order),
        ).train()

    def log(self, record: dict[str, Any]) -> None:
        """Write and show the figures of some steps."""
        if is_first():
            self.folder.append_metrics(record)
            self.display.show(record)

    def skip(self, reason: str) -> None:
        """Write and say why a step was not applied."""
        if is_first():
            self.folder.append_metrics({"step": self.state.step, "skipped": reason})
            self.display.say(f"warning: {reason}")

    def evaluate(self) -> bool:
        """Validation loss and ROUGE, a checkpoint, the best model so far; says whether to stop early."""
        state, samples = self.state, []
        with gathered_for_evaluation(self.engine) as model:
            loss = self.evaluator.loss(model)
            # an untrained model has nothing to tell
            if state.step:
                samples = self.evaluator.summarise(model, self._generation())
        record: dict[str, Any] = {"step": state.step, "validation_loss": loss}
        if samples:
            record |= {name: value.mean for name, value in score(samples).items()}
        is_best = loss < state.best_loss
        if is_best:
            state.best_loss, state.best_step, state.n_worse = loss, state.step, 0
        else:
            state.n_worse += 1
        if is_first():
            self._write_evaluation(record, samples)
        if is_best:
            self._export()
        if state.step:
            self.checkpoints.save(self.engine, state)
        patience = self.arguments.run.patience
        return bool(patience) and state.n_worse >= patience

    def _write_evaluation(self, record: dict[str, Any], samples: list[Any]) -> None:
        self.folder.append_metrics({name: value for name, value in record.items() if math.isfinite(value)})
        if samples:
            self.folder.append_samples(f"Step {record['step']}", samples[:N_SAMPLES])
        draw_curves(self.folder.read_metrics(), self.folder.curves_file)
        figures = "  ".join(f"{name} {value:.2f}" for name, value in record.items() if name.startswith("rouge"))
        self.display.say(f"step {record['step']}: validation loss {record['validation_loss']:.4f}  {figures}".rstrip())

    def _export(self) -> None:
        """Write the model as it is now to RUN/model, for from_pretrained."""
        weights = full_state_dict(self.engine)
        if is_first():
            with half_written(self.folder.model, replaces=True) as draft:
                save_model(self.engine, merged(weights, self.arguments.model), draft)
                save_tokenizer(self.prepared.tokenizer, draft)

    def _generation(self) -> Generation:
        run = self.arguments.run
        return Generation(self.arguments.data.max_target_length, run.num_beams, run.eval_documents)

    def _evaluator(self, documents: Documents) -> Evaluator:
        run = self.arguments.run
        return Evaluator(
            documents.corpus,
            documents.plan,
            documents.collator,
            self.prepared.tokenizer,
            run.per_device_eval_batch_size or run.per_device_train_batch_size,
            self.environment.device,
        )

    def _batches(self, order: BatchOrder) -> Iterator[Batch]:
        run, documents, world_size = self.arguments.run, self.prepared.splits["train"], self.environment.world_size
        indices = RankBatches(
            order, self.state.step, self.environment.rank, world_size, run.gradient_accumulation_steps
        )
        loader: DataLoader[Any] = DataLoader(
            IndexedRows(documents),
            batch_sampler=indices,
            collate_fn=documents.collator,
            num_workers=run.dataloader_num_workers,
            # it draws a number when it starts: from the model's generator, a resumed run would have other dropout
            generator=torch.Generator(),
        )
        return iter(loader)


@dataclass
class IndexedRows(Dataset[dict[str, Any]]):
    """The documents of a plan, by their place in it."""

    documents: Documents

    def __len__(self) -> int:
        return len(self.documents.plan.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index = self.documents.plan.indices[place]
        return {**self.documents.corpus[index], "index": index}
