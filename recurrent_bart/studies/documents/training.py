"""Training loop of studies on documents. All models use this loop, in plain PyTorch and one process."""

import copy
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import Collator
from recurrent_bart.evaluation.evaluator import Evaluator, Generation
from recurrent_bart.evaluation.rouge import rouge_per_sample
from recurrent_bart.model.generation_settings import change_settings
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.run_folder import git_commit, versions
from recurrent_bart.studies.documents.master_weights import MasterWeights
from recurrent_bart.studies.documents.models import Reader, build_reader, collate_as
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.study_run import RunFile, describe_device
from recurrent_bart.training.arguments import Arguments, parse_arguments
from recurrent_bart.training.description import learning_rates
from recurrent_bart.training.document_order import by_documents
from recurrent_bart.training.environment import Environment, use_bf16
from recurrent_bart.training.optimization import build_optimizer, build_scheduler
from recurrent_bart.training.preparation import open_splits
from recurrent_bart.training.training_batches import TrainingBatches

# the step number grows by this factor from one evaluation to the next, in every run alike
GROWTH = 1.25


class TextTraining:
    """Trainer of one model of a study on documents."""

    def __init__(self, run: TextRun, device: torch.device):
        self.run, self.device = run, device
        self.arguments = arguments = parse_run(run)
        tokenizer, config, splits = open_splits(arguments.model, arguments.data)
        by_segments = splits["train"].collator
        collator = collate_as(run.reads, by_segments)
        train, validation = (replace(splits[name], collator=collator) for name in ("train", "validation"))
        self.is_bf16 = use_bf16(arguments.run.precision, device)
        built = build_reader(run, arguments, config, by_segments.sizes).to(device)
        self.weights = MasterWeights(built, self.is_bf16)
        sees_several = config.has_state or config.decoder_context in ("section", "all")
        self.reader = Reader(
            self.weights.model, run.reads == "whole" or sees_several, device, may_plan=config.has_state
        )
        rates = learning_rates(arguments, config)
        self.optimizer = build_optimizer(built, rates, arguments.run.weight_decay, arguments.run.adam_beta2)
        self.scheduler = build_scheduler(self.optimizer, arguments.run)
        self.state = TrainerState()
        # models with another value of `reads` use the document order of `reads="segments"`
        order = by_documents(arguments.run, train.plan.n_segments, world_size=1, state=self.state)
        self.batches = TrainingBatches(train, order, arguments.run, Environment(0, 0, 1, device), self.state)
        self.evaluator = Evaluator(
            validation.corpus,
            validation.plan,
            collator,
            tokenizer,
            # Evaluation keeps the logits of all targets of a batch in memory, so batches are as small as in training.
            arguments.run.per_device_train_batch_size,
            device,
        )
        self.targets = list_targets(self.evaluator)
        self.seconds, self.n_tokens = 0.0, 0
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        # the seed of launch/train.py, for the same dropout
        torch.manual_seed(arguments.run.seed + 1)

    def train(self, budget_seconds: float = math.inf, on_evaluation: Callable[[], None] = lambda: None) -> str:
        """Train until the run ends. Return the reason: `"time"` (`seconds`), `"steps"`, `"diverged"` or `"budget"`.

        No step starts after `budget_seconds` of wall time, evaluations included.
        """
        deadline = time.perf_counter() + budget_seconds
        ended = None
        while ended is None:
            ended = self._train_to_evaluation(deadline)
            on_evaluation()
        self.batches.close()
        return ended

    def train_step(self) -> Tensor:
        """Run one optimizer step. Return the loss per target token."""
        run = self.arguments.run
        batches = [self.reader.needed(next(self.batches)) for _ in range(run.gradient_accumulation_steps)]
        n_targets = sum(batch.n_targets() for batch in batches)
        losses = []
        for batch in batches:
            loss = self.reader.loss(batch, n_targets)
            loss.backward()
            self.weights.collect_gradients()
            losses.append(loss.detach())
            self.n_tokens += batch.n_tokens()
        if run.max_grad_norm:
            nn.utils.clip_grad_norm_(self.weights.master.parameters(), run.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.round()
        self.scheduler.step()
        self.state.step += 1
        return torch.stack(losses).sum()

    def evaluate(self, loss: float) -> None:
        """Append a point to the curve. Keep a copy of the weights if the validation loss is the lowest so far."""
        self.reader.model.eval()
        found = self.evaluator.target_losses(self.reader.target_losses)
        self.reader.model.train()
        by_target = [round(value, 4) for index in sorted(found) for value in found[index]]
        point = {"step": self.state.step, "seconds": self.seconds, "n_tokens": self.n_tokens, "loss": loss}
        validation_loss = sum(by_target) / sum(target["n_tokens"] for target in self.targets)
        if all(validation_loss < other["validation_loss"] for other in self.curve):
            self.best = copy.deepcopy(self.reader.model.state_dict())
        self.curve.append(point | {"validation_loss": validation_loss, "target_losses": by_target})

    def texts(self) -> list[dict[str, Any]]:
        """Return texts of the best weights for the first `--eval_documents` documents, with their ROUGE scores."""
        self.reader.model.load_state_dict(self.best)
        self.reader.model.eval()
        run = self.arguments.run
        length = self.evaluator.collator.max_target_length
        generation = self.reader.model.generation_config
        change_settings(generation, run.generation_settings(), run.max_new_tokens or length)
        how = Generation(generation.max_new_tokens, n_documents=run.eval_documents)
        writer = replace(self.evaluator, batch_size=run.per_device_eval_batch_size or self.evaluator.batch_size)
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
        is_cuda = self.device.type == "cuda"
        return {
            "run": asdict(self.run),
            "device": describe_device(str(self.device)),
            "precision": "bf16" if self.is_bf16 else "fp32",
            "n_parameters": sum(parameter.numel() for parameter in self.reader.model.parameters()),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if is_cuda else None,
            "targets": self.targets,
            "curve": self.curve,
        }

    def _train_to_evaluation(self, deadline: float) -> str | None:
        """Train up to the next evaluation, and evaluate. Return the reason if the run ends, else None."""
        last = self.arguments.run.max_steps
        until, ended = next_evaluation(self.state.step, self.arguments.run.eval_every), None
        losses: list[Tensor] = []
        started = time.perf_counter()
        while ended is None and self.state.step < until:
            losses.append(self.train_step())
            now = time.perf_counter()
            if self.run.seconds is not None and self.seconds + now - started >= self.run.seconds:
                ended = "time"
            elif self.state.step >= last:
                ended = "steps"
            elif now > deadline:
                ended = "budget"
        # float() waits for the device, so `seconds` includes all kernels of the steps
        loss = float(torch.stack(losses).mean())
        self.seconds += time.perf_counter() - started
        self.evaluate(loss)
        return ended if math.isfinite(loss) else "diverged"


def execute_text(file: RunFile, device: torch.device, budget_seconds: float) -> None:
    """Train the model that a run file describes, and generate texts. Each evaluation updates the file.

    Raises:
        ValueError: The run's flags or the documents are invalid.
    """
    training = TextTraining(TextRun(**file.read()["run"]), device)
    origin = {"date": time.strftime("%Y-%m-%d"), "git_commit": git_commit(), "versions": versions()}
    stopped = training.train(budget_seconds, on_evaluation=lambda: file.write(origin | training.result()))
    results = {"texts": training.texts(), "foreign_state_losses": training.foreign_state_losses()}
    file.write(origin | training.result() | results | {"stopped": stopped})


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
