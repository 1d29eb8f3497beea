"""A run of a study, in one process and in plain PyTorch.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Generator, Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.memory_tasks import BOS, EOS, PAD, Accuracy, MemoryTask, score
from recurrent_bart.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.monitoring.run_folder import git_commit, versions
from recurrent_bart.studies.study_run import MODEL, RunFile, StudyRun, describe_device
from recurrent_bart.training.curriculum import Curriculum
from recurrent_bart.training.optimization import LearningRates, build_optimizer, learning_rate_factor

# a task counts as learnt after so many evaluations in a row at the last stage with at least this token accuracy
LEARNT, LEARNT_EVALUATIONS = 0.999, 3
REACHED = 0.9
# far from any seed to train with
TEST_SEED = 10**9
# segments of a forward pass in evaluation
TEST_PASS = 1024


class SingleRun:
    """Trains one model on one task.

    Args:
        run: What is trained.
        device: Where.
    """

    def __init__(self, run: StudyRun, device: torch.device):
        self.run, self.device = run, device
        self.task, self.test_task = run.build_tasks()
        torch.manual_seed(run.seed)
        self.model = RecurrentBartForConditionalGeneration(build_config(run, self.task)).to(device).train()
        self.optimizer = build_optimizer(
            self.model, LearningRates(run.learning_rate, run.learning_rate), run.weight_decay
        )
        factor = learning_rate_factor(run.lr_scheduler, run.warmup_steps, run.max_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.curriculum = Curriculum(run.stages, run.stage_steps, run.seed)
        self.generator = Generator(device).manual_seed(run.seed)
        self.step = self.stage = self.stage_began = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def train(self, budget_seconds: float = math.inf, on_evaluation: Callable[[], None] = lambda: None) -> str:
        """Train until something ends it, and say what.

        Args:
            budget_seconds: No step is begun after so many, evaluations included.
            on_evaluation: Called after each evaluation.

        Returns:
            `"learnt"`, `"steps"`, `"diverged"` or `"budget"`.
        """
        began = time.perf_counter()
        while self.step < self.run.max_steps:
            started = time.perf_counter()
            losses: list[Tensor] = []
            while len(losses) < self.run.eval_every and self.step < self.run.max_steps:
                losses.append(self.train_step())
                if time.perf_counter() - began > budget_seconds:
                    break
            # waits for the device, so that the time is that of the steps
            loss = float(torch.stack(losses).mean())
            self.seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                return "diverged"
            self.evaluate(loss)
            on_evaluation()
            if self.is_learnt():
                return "learnt"
            if time.perf_counter() - began > budget_seconds:
                return "budget"
        return "steps"

    def train_step(self) -> Tensor:
        """One optimizer step, on documents of as many segments as the curriculum draws; gives the loss."""
        n_segments = self.curriculum.draw(self.stage, self.step)
        run = self.run
        batch = self.task.batch(self.generator, run.batch_size, n_segments, run.segment_size)
        loss = self._forward(*batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    def evaluate(self, loss: float) -> None:
        """Measure the stage and the whole task, and move to the next stage if this one is over."""
        n_segments = self.run.stages[self.stage]
        reached = self.accuracy(n_segments)
        whole = reached if n_segments == self.run.stages[-1] else self.accuracy(self.run.stages[-1])
        self.curve.append(
            {
                "step": self.step,
                "seconds": self.seconds,
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

    @torch.no_grad()
    def accuracy(self, n_segments: int) -> Accuracy:
        """Share of right tokens and answers under teacher forcing, on the same documents whenever it is asked."""
        self.model.eval()
        generator = Generator(self.device).manual_seed(TEST_SEED + n_segments)
        predicted, answers, n_left = [], [], self.run.eval_documents
        while n_left > 0:
            size = min(n_left, max(1, TEST_PASS // n_segments))
            input_ids, labels = self.test_task.batch(generator, size, n_segments, self.run.segment_size)
            predicted.append(self._forward(input_ids, labels).logits.argmax(dim=-1))
            answers.append(labels)
            n_left -= size
        self.model.train()
        return score(torch.cat(predicted), torch.cat(answers))

    def is_learnt(self) -> bool:
        """Whether the last evaluations leave nothing to learn."""
        last = self.curve[-LEARNT_EVALUATIONS:]
        n_segments = self.run.stages[-1]
        is_right = [point["n_segments"] == n_segments and point["token_accuracy"] >= LEARNT for point in last]
        return len(last) == LEARNT_EVALUATIONS and all(is_right)

    def result(self) -> dict[str, Any]:
        """What came of it so far."""
        first = next((point for point in self.curve if point["token_accuracy"] >= REACHED), {})
        is_cuda = self.device.type == "cuda"
        return {
            "run": asdict(self.run),
            "device": describe_device(str(self.device)),
            "schedule": self.model.config.schedule,
            "n_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.step,
            "seconds": self.seconds,
            "steps_to_reach": first.get("step"),
            "seconds_to_reach": first.get("seconds"),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if is_cuda else None,
            "curve": self.curve,
        }

    def tested(self) -> dict[str, dict[str, float]]:
        """Accuracy by number of segments."""
        return {str(n_segments): self.accuracy(n_segments)._asdict() for n_segments in self.run.test_segments}

    def _forward(self, input_ids_BNL: Tensor, labels_BT: Tensor) -> Any:
        if self.run.window == "all":
            input_ids_BNL = input_ids_BNL.flatten(1).unsqueeze(1)
        if self.run.window == "last":
            input_ids_BNL = input_ids_BNL[:, -1:]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            return self.model(input_ids=input_ids_BNL, labels=labels_BT)


def execute(file: RunFile, device: torch.device, budget_seconds: float) -> None:
    """Do the run that a file describes, and keep in the file what there is at each moment.

    Raises:
        ValueError: Something is wrong with the run.
    """
    single = SingleRun(StudyRun.from_json(file.read()["run"]), device)
    origin = {"date": time.strftime("%Y-%m-%d"), "git_commit": git_commit(), "versions": versions()}
    stopped = single.train(budget_seconds, on_evaluation=lambda: file.write(origin | single.result()))
    file.write(origin | single.result() | {"accuracy": single.tested(), "stopped": stopped})


def build_config(run: StudyRun, task: MemoryTask) -> RecurrentBartConfig:
    """Architecture with room for the longest document and answer."""
    longest = max(*run.stages, *run.test_segments)
    window = run.segment_size * (longest if run.window == "all" else 1)
    # the same numbers, faster; with one state for all layers there are no diagonals
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
