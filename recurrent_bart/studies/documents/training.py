"""Training of any model of a study on documents, in one process."""

import contextlib
import copy
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Batch, Collator
from recurrent_bart.evaluation.evaluator import Evaluator, Generation
from recurrent_bart.evaluation.rouge import rouge_per_sample
from recurrent_bart.model.generation_settings import change_settings
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.run_folder import git_commit, versions
from recurrent_bart.studies.documents.engine import SingleProcessEngine
from recurrent_bart.studies.documents.models import Reader, build_reader, collate_as
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.study_run import RunFile, describe_device
from recurrent_bart.training.arguments import Arguments, parse_arguments
from recurrent_bart.training.description import learning_rates
from recurrent_bart.training.document_order import by_documents
from recurrent_bart.training.environment import Environment, use_bf16
from recurrent_bart.training.optimization import build_optimizer, build_scheduler
from recurrent_bart.training.preparation import open_splits
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.training_batches import TrainingBatches

# the step number grows by this factor from one evaluation to the next, in every run alike
GROWTH = 1.25


class TextTraining(Trainer):
    """Trainer of one model of a study on documents.

    After `budget_seconds`, evaluations included, no step starts but the first.

    Attributes:
        ended: Reason why the run ends: `"time"` (`TextRun.seconds`), `"steps"`, `"budget"` or `"diverged"`.
        seconds: Training time, evaluations excluded.
    """

    batches: TrainingBatches

    def __init__(self, text_run: TextRun, device: torch.device, budget_seconds: float = math.inf):
        self.deadline = time.perf_counter() + budget_seconds
        self.text_run, self.ended = text_run, ""
        self.arguments = arguments = parse_run(text_run)
        run, state = arguments.run, TrainerState()
        tokenizer, config, splits = open_splits(arguments.model, arguments.data)
        by_segments = splits["train"].collator
        collator = collate_as(text_run.reads, by_segments)
        train, validation = (replace(splits[name], collator=collator) for name in ("train", "validation"))
        self.is_bf16 = use_bf16(run.precision, device)
        built = build_reader(text_run, arguments, config, by_segments.sizes).to(device)
        optimizer = build_optimizer(built, learning_rates(arguments, config), run.weight_decay, run.adam_beta2)
        engine = SingleProcessEngine(built, build_scheduler(optimizer, run), run.max_grad_norm, self.is_bf16)
        # models with another value of `reads` use the document order of `reads="segments"`
        order = by_documents(run, train.plan.n_segments, world_size=1, state=state)
        batches = TrainingBatches(train, order, run, Environment(0, 0, 1, device), state)
        super().__init__(engine, batches, run, state, on_log=lambda record: None, on_evaluation=self.validate)
        sees_several = config.has_state or config.decoder_context in ("section", "all")
        reads_all = text_run.reads == "whole" or sees_several
        self.reader = Reader(engine.module, reads_all, device, may_plan=config.has_state)
        self.evaluator = Evaluator(
            validation.corpus,
            validation.plan,
            collator,
            tokenizer,
            # Evaluation keeps the logits of all targets of a batch in memory, so batches are as small as in training.
            run.per_device_train_batch_size,
            device,
        )
        self.targets = list_targets(self.evaluator)
        self.seconds, self.n_tokens = 0.0, 0
        # sum of the losses of the steps since the last evaluation
        self.loss: Any = 0.0
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        # the seed of launch/train.py, for the same dropout
        torch.manual_seed(run.seed + 1)

    def train_step(self) -> None:
        """Run one optimizer step. Set `ended` if the run ends after it."""
        started = time.perf_counter()
        super().train_step()
        now = time.perf_counter()
        self.seconds += now - started
        if self.text_run.seconds is not None and self.seconds >= self.text_run.seconds:
            self.ended = "time"
        elif self.state.step >= self.run.max_steps:
            self.ended = "steps"
        elif now > self.deadline:
            self.ended = "budget"

    def accumulate_gradients(self, batches: list[Batch], n_targets: float) -> None:
        """Run one forward and one backward pass over the part of each batch that the model reads."""
        for batch in map(self.reader.needed, batches):
            loss = self.reader.loss(batch, n_targets)
            self.engine.backward(loss)
            self.loss += loss.detach()
            self.n_tokens += batch.n_tokens()

    def is_evaluated_after(self, step: int) -> bool:
        """Return True if the run ends, or if step `step` is followed by an evaluation in every run."""
        return bool(self.ended) or step == next_evaluation(step - 1, self.run.eval_every)

    def is_logged_at(self, step: int) -> bool:
        """Return False, because a log line would wait for the device."""
        return False

    def validate(self) -> bool:
        """Append a point to the curve. Keep the weights of the lowest validation loss. Return True if the run ends."""
        started = time.perf_counter()
        # float() waits for the device, so `seconds` includes all kernels of the steps
        loss, self.loss = float(self.loss) / self.step_metrics.n_steps, 0.0
        self.seconds += time.perf_counter() - started
        self.reader.model.eval()
        found = self.evaluator.target_losses(self.reader.target_losses)
        self.reader.model.train()
        by_target = [round(value, 4) for index in sorted(found) for value in found[index]]
        point = {"step": self.state.step, "seconds": self.seconds, "n_tokens": self.n_tokens, "loss": loss}
        validation_loss = sum(by_target) / sum(target["n_tokens"] for target in self.targets)
        if all(validation_loss < other["validation_loss"] for other in self.curve):
            self.best = copy.deepcopy(self.reader.model.state_dict())
        self.curve.append(point | {"validation_loss": validation_loss, "target_losses": by_target})
        if not math.isfinite(loss):
            self.ended = "diverged"
        elif not self.ended and time.perf_counter() > self.deadline:
            self.ended = "budget"
        return bool(self.ended)

    def texts(self) -> list[dict[str, Any]]:
        """Return texts of the best weights for the first `--eval_documents` documents, with their ROUGE scores."""
        self.reader.model.load_state_dict(self.best)
        self.reader.model.eval()
        length = self.evaluator.collator.max_target_length
        generation = self.reader.model.generation_config
        change_settings(generation, self.run.generation_settings(), self.run.max_new_tokens or length)
        how = Generation(generation.max_new_tokens, n_documents=self.run.eval_documents)
        writer = replace(self.evaluator, batch_size=self.run.per_device_eval_batch_size or self.evaluator.batch_size)
        samples = writer.summarise(self.reader.model, how)
        scores = rouge_per_sample([sample.generated for sample in samples], [sample.target for sample in samples])
        figures = [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]
        # the samples are of the first documents, so they match the first targets
        return [
            {"document": target["document"], "target": target["target"], "generated": sample.generated} | figure
            for target, sample, figure in zip(self.targets, samples, figures, strict=False)
        ]

    def foreign_state_losses(self) -> list[float] | None:
        """Return each target's loss of the best weights with the states of other documents, or None without a state.

        Batches hold documents of like length, so a document and the owner of its states end at about the same segment.
        None also if there are fewer documents than segments.
        """
        model, is_document = self.reader.model, self.arguments.data.task == "document"
        is_read = isinstance(model, RecurrentBartForConditionalGeneration) and model.config.has_state
        n_documents, most = len(self.evaluator.plan.indices), max(self.evaluator.plan.n_segments)
        if not (is_read and is_document) or n_documents < max(2, most):
            return None
        model.load_state_dict(self.best)
        model.eval()
        # a batch with fewer documents than segments would lend a document its own state
        sizes = itertools.count(max(self.evaluator.batch_size, most, 2))
        size = next(size for size in sizes if size >= n_documents or not 0 < n_documents % size < max(most, 2))
        evaluator = replace(self.evaluator, batch_size=size)
        found = evaluator.target_losses(self.reader.losses_with_foreign_states)
        return [round(value, 4) for index in sorted(found) for value in found[index]]

    def result(self) -> dict[str, Any]:
        """Return the results of the run so far, for its JSON file."""
        device = self.engine.device
        return {
            "run": asdict(self.text_run),
            "device": describe_device(str(device)),
            "precision": "bf16" if self.is_bf16 else "fp32",
            "n_parameters": sum(parameter.numel() for parameter in self.reader.model.parameters()),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "targets": self.targets,
            "curve": self.curve,
        }


def execute_text(file: RunFile, device: torch.device, budget_seconds: float) -> None:
    """Train the model that a run file describes, and generate texts. Each evaluation updates the file.

    Raises:
        ValueError: The run's flags or the documents are invalid.
    """
    training = TextTraining(TextRun(**file.read()["run"]), device, budget_seconds)
    origin = {"date": time.strftime("%Y-%m-%d"), "git_commit": git_commit(), "versions": versions()}
    training.on_save = lambda metrics: file.write(origin | training.result())
    with contextlib.closing(training.batches):
        training.train()
    results = {"texts": training.texts(), "foreign_state_losses": training.foreign_state_losses()}
    file.write(origin | training.result() | results | {"stopped": training.ended})


def prepare_documents(run: TextRun) -> None:
    """Write tokenizer and tokenized documents to the cache, so that parallel runs do not all build them."""
    arguments = parse_run(run)
    open_splits(arguments.model, arguments.data)


def parse_run(run: TextRun) -> Arguments:
    """Parse the launch/train.py flags of a run."""
    arguments = parse_arguments([f"--{name}={value}" for name, value in {**run.flags, "seed": run.seed}.items()])
    return replace(arguments, run=arguments.run.of_length(arguments.run.max_steps))


def list_targets(evaluator: Evaluator) -> list[dict[str, Any]]:
    """Return for every target, in order: document, index in the document, end position and length in tokens.

    Indices run on over the corpus rows of one document.
    """
    numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    return [
        {"document": name, "target": next(numbers[name]), "position": position, "n_tokens": n_tokens}
        for index in sorted(evaluator.plan.indices)
        for name in [evaluator.documents[index]]
        for position, n_tokens in _targets_of(evaluator.corpus[index], evaluator.collator)
    ]


def _targets_of(row: dict[str, Any], collator: Collator) -> Iterator[tuple[int, int]]:
    sections = zip(row["sections"], row["summaries"], strict=True)
    ends = itertools.accumulate(len(section) for section in row["sections"])
    target_ends = [end for end, (section, summary) in zip(ends, sections, strict=True) if section and summary]
    _, targets = collator.segments(row)
    # sections after the truncation have no target
    return zip(target_ends, (len(target) for target in targets if target), strict=False)


def next_evaluation(step: int, first: int) -> int:
    """Return the first evaluation step after `step`."""
    found = first
    while found <= step:
        found = max(found + 1, round(found * GROWTH))
    return found
