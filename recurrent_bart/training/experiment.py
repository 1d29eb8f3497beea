"""A run from its arguments to its last evaluation: what `launch/train.py` calls."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch.utils.data import DataLoader, Dataset

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.batches import Batch, BatchOrder, RankBatches
from recurrent_bart.data.corpus import half_written
from recurrent_bart.data.tokenizer import save_tokenizer
from recurrent_bart.distributed import first_then_all, from_first, is_first, only_first
from recurrent_bart.evaluation.evaluator import Evaluator, Generation, score
from recurrent_bart.monitoring.curves import draw_curves
from recurrent_bart.monitoring.progress import ProgressDisplay
from recurrent_bart.training.arguments import Arguments
from recurrent_bart.training.checkpoints import Checkpoints, TrainerState
from recurrent_bart.training.engine import build_engine, full_state_dict
from recurrent_bart.training.environment import Environment
from recurrent_bart.training.model_building import build_model
from recurrent_bart.training.optimization import LearningRates, build_optimizer, build_scheduler, is_recurrence
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
    rates = learning_rates(arguments, prepared.config)
    optimizer = build_optimizer(model, rates, run.weight_decay)
    engine = build_engine(model, optimizer, build_scheduler(optimizer, run), prepared.deepspeed)
    # from here on processes differ in their dropout
    torch.manual_seed(run.seed + 1 + environment.rank)
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    checkpoints = Checkpoints(prepared.folder.checkpoints, run.keep_last)
    state = checkpoints.load(engine) if run.resume else TrainerState()
    only_first(lambda: _open_folder(prepared, arguments, state))
    with Session(arguments, environment, prepared, engine, checkpoints, state) as session:
        session.train()
    return prepared.folder.path


def _open_folder(prepared: Preparation, arguments: Arguments, state: TrainerState) -> None:
    prepared.folder.create()
    prepared.folder.write_config(
        arguments=asdict(arguments), model=prepared.config.to_dict(), deepspeed=prepared.deepspeed
    )
    save_tokenizer(prepared.tokenizer, prepared.folder.tokenizer)
    prepared.folder.forget_after(state.step)


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
            for line in describe(self.arguments, self.environment, self.prepared, self.engine):
                self.display.say(line)
        return self

    def __exit__(self, *_: Any) -> None:
        if is_first():
            self.display.__exit__()

    def train(self) -> None:
        """Run the loop."""
        Trainer(
            engine=self.engine,
            batches=self._batches(),
            run=self.arguments.run,
            state=self.state,
            on_log=self.log,
            on_evaluation=self.evaluate,
        ).train()

    def log(self, record: dict[str, Any]) -> None:
        """Write and show the figures of some steps."""
        if is_first():
            self.folder.append_metrics(record)
            self.display.show(record)

    def evaluate(self) -> bool:
        """Validation loss and ROUGE, a checkpoint, the best model so far; says whether to stop early."""
        state = self.state
        self.engine.eval()
        loss = self.evaluator.loss(self.engine.module)
        record: dict[str, Any] = {"step": state.step, "validation_loss": loss}
        samples = []
        # an untrained model has nothing to tell
        if state.step:
            samples = self.evaluator.summarise(self.engine.module, self._generation())
            record |= {name: value.mean for name, value in score(samples).items()}
        self.engine.train()
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
        self.folder.append_metrics(record)
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
                self.engine.module.save_pretrained(draft, state_dict=weights)
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

    def _batches(self) -> Iterator[Batch]:
        run, documents, world_size = self.arguments.run, self.prepared.splits["train"], self.environment.world_size
        order = BatchOrder(documents.plan.n_segments, global_batch(self.arguments, world_size), run.seed)
        indices = RankBatches(
            order, self.state.step, self.environment.rank, world_size, run.gradient_accumulation_steps
        )
        loader: DataLoader[Any] = DataLoader(
            IndexedRows(documents),
            batch_sampler=indices,
            collate_fn=documents.collator,
            num_workers=run.dataloader_num_workers,
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


def learning_rates(arguments: Arguments, config: RecurrentBartConfig) -> LearningRates:
    """Highest learning rates of a run."""
    return LearningRates.of(arguments.run, arguments.model.model_name_or_path is not None, config.d_model)


def global_batch(arguments: Arguments, world_size: int) -> int:
    """Documents of one optimizer step."""
    return arguments.run.per_device_train_batch_size * arguments.run.gradient_accumulation_steps * world_size


def describe(
    arguments: Arguments, environment: Environment, prepared: Preparation, engine: DeepSpeedEngine
) -> list[str]:
    """What is about to be trained, each derived quantity with where it comes from."""
    run, config = arguments.run, prepared.config
    train, validation = prepared.splits["train"].plan, prepared.splits["validation"].plan
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    total, own = sum(sizes.values()), sum(size for name, size in sizes.items() if is_recurrence(name))
    order = BatchOrder(train.n_segments, global_batch(arguments, environment.world_size), run.seed)
    rates = learning_rates(arguments, config)
    lines = [
        f"run        {prepared.folder.path}",
        f"model      {total / 1e6:.1f} M parameters, {own / 1e6:.1f} M of them the recurrence's",
        f"segments   {config.segment_size} tokens, {config.pre_seq_len} prefix positions, "
        f"bptt_depth {config.bptt_depth}, at most {config.max_n_segments} segments a document",
        f"documents  {len(train.indices)} to train on, of {sum(train.n_segments) / len(train.indices):.1f} segments; "
        f"{len(validation.indices)} for validation; task {arguments.data.task}",
        f"steps      {run.max_steps} of {order.global_batch} documents = {run.per_device_train_batch_size} a device "
        f"x {run.gradient_accumulation_steps} accumulated x {environment.world_size} processes; "
        f"{order.epoch(run.max_steps):.1f} times through the documents",
        f"rates      {rates.backbone:.1e}, recurrence {rates.recurrence:.1e}, {run.lr_scheduler} decay after "
        f"{run.warmup_steps} steps of warm-up",
        f"engine     ZeRO-{engine.zero_optimization_stage()}, {environment.device.type}, "
        f"{'bf16' if engine.bfloat16_enabled() else 'fp32'}",
    ]
    for name, plan in (("training", train), ("validation", validation)):
        if plan.n_cut or plan.n_left_out:
            lines.append(
                f"cut        {plan.n_cut} {name} documents after {config.max_n_segments} segments; "
                f"{plan.n_left_out} left out, with no target before the cut"
            )
    return lines
