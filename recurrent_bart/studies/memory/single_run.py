"""Training and test of one model on one memory task, in plain PyTorch. Several runs take turns in one process.

Shape suffixes: B documents, N segments, L tokens in a segment, A attended positions, D model width, T target length,
V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Generator, Tensor, nn

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.run_folder import git_commit, versions
from recurrent_bart.studies.memory.graphed_function import GraphedFunction
from recurrent_bart.studies.memory.turns import Turns
from recurrent_bart.studies.study_run import MODEL, RunFile, StudyRun, describe_device
from recurrent_bart.studies.tasks.drawn_documents import DrawnDocuments
from recurrent_bart.studies.tasks.memory_tasks import BOS, EOS, PAD, Accuracy, MemoryTask, score
from recurrent_bart.training.curriculum import Curriculum
from recurrent_bart.training.optimization import LearningRates, build_optimizer, learning_rate_factor

# A task counts as learnt after LEARNT_EVALUATIONS consecutive evaluations of the last stage with token accuracy LEARNT.
LEARNT, LEARNT_EVALUATIONS = 0.999, 3
REACHED = 0.9
# The reserved test time is this multiple of the evaluations' time per segment, because new lengths need a capture.
SPARE = 2.0
# The reserved test time is at most this share of the run's time so far, because the first evaluations include captures.
MOST_SPARE = 0.5


class SingleRun:
    """Trainer of one model on one task."""

    def __init__(self, run: StudyRun, device: torch.device):
        self.run, self.device = run, device
        generator = Generator(device).manual_seed(run.seed)
        self.documents, *self.easier = (_documents(run, generator, **changes) for changes in ({}, *run.easier))
        if run.encoder_loss and self.documents.task.answer_places(run.segment_size) is None:
            raise ValueError(
                f"encoder_loss={run.encoder_loss}: must be 0 for the task {run.task_name()}, whose answers have no "
                "fixed positions"
            )
        torch.manual_seed(run.seed)
        self.model = RecurrentBartForConditionalGeneration(build_config(run, self.documents.task)).to(device).train()
        # The learning rate is a tensor on the device, because a captured step reads it there.
        self.learning_rate = torch.zeros((), device=device)
        rates = LearningRates(self.learning_rate, self.learning_rate)
        self.optimizer = build_optimizer(self.model, rates, run.weight_decay, run.adam_beta2)
        self.learning_rate_factor = learning_rate_factor(run.lr_scheduler, run.warmup_steps, run.max_steps)
        easier = tuple(changes.get("n_segments", 1) for changes in run.easier)
        self.curriculum = Curriculum(easier + run.stages, run.stage_steps, run.seed)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.update, self.predict = GraphedFunction(self._update, pool), GraphedFunction(self._predict, pool)
        self.step = self.stage = self.stage_began = 0
        self.began, self.seconds = time.time(), 0.0
        self.evaluation_seconds, self.n_evaluated_segments = 0.0, 0
        self.curve: list[dict[str, float]] = []

    def train(self, deadline: float = math.inf, on_evaluation: Callable[[], None] = lambda: None) -> Turns[str]:
        """Train until the run ends. Return the reason: `"learnt"`, `"steps"`, `"diverged"` or `"budget"`.

        Training stops early enough to finish the tests before `deadline`, a time on the clock of `time.time`.
        """
        while self.step < self.run.max_steps:
            loss = yield from self._train_until_evaluation(deadline)
            if not math.isfinite(loss):
                return "diverged"
            yield from self.evaluate(loss)
            on_evaluation()
            if self.is_learnt():
                return "learnt"
            if self.is_over(deadline):
                return "budget"
        return "steps"

    def _train_until_evaluation(self, deadline: float) -> Turns[float]:
        started = time.perf_counter()
        losses: list[Tensor] = []
        while len(losses) < self.run.eval_every and self.step < self.run.max_steps:
            losses.append(self.train_step())
            yield
            if self.is_over(deadline):
                break
        self.seconds += time.perf_counter() - started
        return float(torch.stack(losses).mean())

    def train_step(self) -> Tensor:
        """Run one optimizer step on documents whose length the curriculum draws. Return the loss."""
        n_segments = self.curriculum.draw(self.stage, self.step)
        self.learning_rate.fill_(self.run.learning_rate * self.learning_rate_factor(self.step))
        loss = self.update(*self.stage_documents.batch(n_segments))
        self.step += 1
        return loss

    @property
    def stage_documents(self) -> DrawnDocuments:
        """Documents of the current stage."""
        return self.easier[self.stage] if self.stage < len(self.easier) else self.documents

    def evaluate(self, loss: float) -> Turns[None]:
        """Evaluate the current stage and the whole task. Begin the next stage if the current stage is over."""
        documents, n_segments = self.stage_documents, self.curriculum.longest(self.stage)
        reached = whole = yield from self.accuracy(n_segments, documents)
        if documents is not self.documents or n_segments != self.run.stages[-1]:
            whole = yield from self.accuracy(self.run.stages[-1])
        self.curve.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "stage": self.stage,
                "n_segments": n_segments,
                "loss": loss,
                "stage_accuracy": reached.token_accuracy,
                "token_accuracy": whole.token_accuracy,
                "exact_match": whole.exact_match,
            }
        )
        is_reached = reached.token_accuracy >= self.run.threshold
        if self.curriculum.is_over(self.stage, self.step - self.stage_began, is_reached):
            self.stage, self.stage_began = self.stage + 1, self.step

    def accuracy(self, n_segments: int, documents: DrawnDocuments | None = None) -> Turns[Accuracy]:
        """Return the accuracy under teacher forcing on `documents` (default: documents of the whole task)."""
        started = time.perf_counter()
        predicted, answers = [], []
        for input_ids, labels in (documents or self.documents).tests(n_segments, self.run.eval_documents):
            predicted.append(self.predict(input_ids, labels))
            answers.append(labels)
            yield
        self.evaluation_seconds += time.perf_counter() - started
        self.n_evaluated_segments += n_segments
        return score(torch.cat(predicted).cpu(), torch.cat(answers).cpu())

    def is_over(self, deadline: float) -> bool:
        """Return True if the last evaluation and the tests need all time left, estimated from past evaluations."""
        n_segments = sum(self.run.test_segments) + 2 * self.run.stages[-1]
        needed = SPARE * n_segments * self.evaluation_seconds / max(1, self.n_evaluated_segments)
        now = time.time()
        return now + min(needed, MOST_SPARE * (now - self.began)) > deadline

    def is_learnt(self) -> bool:
        """Return True if the last `LEARNT_EVALUATIONS` evaluations reached the accuracy `LEARNT`."""
        last = self.curve[-LEARNT_EVALUATIONS:]
        n_segments = self.run.stages[-1]
        is_right = [point["n_segments"] == n_segments and point["token_accuracy"] >= LEARNT for point in last]
        return len(last) == LEARNT_EVALUATIONS and all(is_right)

    def result(self) -> dict[str, Any]:
        """Return the results of the run so far, for its JSON file."""
        first = next((point for point in self.curve if point["token_accuracy"] >= REACHED), {})
        # memory of weights and of both AdamW moments, which GraphedFunction.peak_bytes does not include
        resident_bytes = 3 * sum(parameter.nbytes for parameter in self.model.parameters())
        return {
            "run": asdict(self.run),
            "device": describe_device(str(self.device)),
            "schedule": self.model.config.schedule,
            "n_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.step,
            "seconds": self.seconds,
            "steps_to_reach": first.get("step"),
            "seconds_to_reach": first.get("seconds"),
            "peak_bytes": resident_bytes + self.update.peak_bytes if self.device.type == "cuda" else None,
            "curve": self.curve,
        }

    def tested(self) -> Turns[dict[str, dict[str, float]]]:
        """Test the model. Return the accuracy for each number of segments in `test_segments`."""
        found = {}
        for n_segments in self.run.test_segments:
            accuracy = yield from self.accuracy(n_segments)
            found[str(n_segments)] = accuracy._asdict()
        return found

    def _update(self, input_ids_BNL: Tensor, labels_BT: Tensor) -> Tensor:
        """Run forward pass, backward pass and optimizer step. Return the loss of the decoder."""
        output = self._forward(input_ids_BNL, labels_BT)
        loss = output.loss
        if self.run.encoder_loss:
            loss = loss + self.run.encoder_loss * self._encoder_loss(output.encoder_last_hidden_state, labels_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm)
        self.optimizer.step()
        # gradients must not outlive a captured step: other CUDA graphs reuse their memory
        self.optimizer.zero_grad()
        return output.loss.detach()

    def _encoder_loss(self, hidden_BAD: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the answer's loss at the positions of the last segment that ask for the answer."""
        segment_size = self.stage_documents.segment_size
        places = self.stage_documents.task.answer_places(segment_size)
        assert places is not None
        logits_BTV = self.model.lm_head(hidden_BAD[:, -segment_size:][:, places])
        return nn.functional.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT)

    @torch.no_grad()
    def _predict(self, input_ids_BNL: Tensor, labels_BT: Tensor) -> Tensor:
        self.model.eval()
        predicted_BT = self._forward(input_ids_BNL, labels_BT).logits.argmax(dim=-1)
        self.model.train()
        return predicted_BT

    def _forward(self, input_ids_BNL: Tensor, labels_BT: Tensor) -> Any:
        if self.run.window == "all":
            input_ids_BNL = input_ids_BNL.flatten(1).unsqueeze(1)
        if self.run.window == "last":
            input_ids_BNL = input_ids_BNL[:, -1:]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            return self.model(input_ids=input_ids_BNL, labels=labels_BT)


def execute(file: RunFile, device: torch.device, deadline: float) -> Turns[None]:
    """Train and test the model that a run file describes. Each evaluation updates the file.

    Training stops early enough to finish the tests before `deadline`, a time on the clock of `time.time`.

    Raises:
        ValueError: The run's fields are invalid or do not fit together.
    """
    single = SingleRun(StudyRun.from_json(file.read()["run"]), device)
    origin = {"date": time.strftime("%Y-%m-%d"), "git_commit": git_commit(), "versions": versions()}
    stopped = yield from single.train(deadline, on_evaluation=lambda: file.write(origin | single.result()))
    trained = origin | single.result()
    accuracy = yield from single.tested()
    file.write(trained | {"accuracy": accuracy, "stopped": stopped})


def _documents(
    run: StudyRun, generator: Generator, segment_size: int | None = None, n_segments: int = 1, **changes: Any
) -> DrawnDocuments:
    return DrawnDocuments(*run.build_tasks(**changes), generator, run.batch_size, segment_size or run.segment_size)


def build_config(run: StudyRun, task: MemoryTask) -> RecurrentBartConfig:
    """Build an architecture with room for the longest document and answer."""
    longest = max(*run.stages, *run.test_segments)
    window = run.segment_size * (longest if run.window == "all" else 1)
    # The wavefront gives the same values faster. It is impossible with one state for all layers (recurrence "top").
    schedule = "sequential" if run.model.get("recurrence") == "top" else "wavefront"
    return RecurrentBartConfig(
        **MODEL | {"schedule": schedule} | run.model,
        vocab_size=task.vocab_size,
        segment_size=window,
        max_position_embeddings=max(window, task.target_length(longest)),
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
