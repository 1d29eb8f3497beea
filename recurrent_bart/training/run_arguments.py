"""Flags of training, evaluation and checkpoints."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS
from recurrent_bart.model.scheduled_sampling import ORACLES
from recurrent_bart.monitoring.best_metric import BEST_METRICS
from recurrent_bart.training.argument_fields import (
    check_above,
    check_at_least,
    check_at_most,
    check_below,
    check_choice,
    flag,
)
from recurrent_bart.training.curriculum import Curriculum, parse_stages
from recurrent_bart.training.generation_arguments import GenerationArguments

PRECISIONS = ("auto", "bf16", "fp32")
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")

# flags of which only one can be given
ALTERNATIVES = {"max_steps": "num_train_epochs", "warmup_steps": "warmup_ratio"}
# values of flags that are not given, if not None
NOT_GIVEN = {"max_steps": -1, "eval_every": 0}


@dataclass
class RunArguments(GenerationArguments):
    """Flags of training, evaluation and checkpoints."""

    _argument_group_name: ClassVar[str] = "training, evaluation and generation"

    output_dir: str | None = flag(None, "folder of the run; if not given: a new folder under runs/")
    resume: str | None = flag(
        None, "folder of a run to continue from its last checkpoint; flags that are not given keep the run's values"
    )
    deepspeed: str | None = flag(
        None, "DeepSpeed configuration: a JSON file, or zero2, zero3 or zero3_offload; if not given: zero2"
    )
    max_steps: int = flag(
        -1, "optimizer steps of the run, including the steps before --resume; -1: the steps of --num_train_epochs"
    )
    num_train_epochs: float | None = flag(
        None,
        "passes over the training documents, instead of --max_steps; fractions are allowed; if not given: 3, or 50 "
        "steps of the built-in corpus",
    )
    per_device_train_batch_size: int = flag(
        8, "documents per device in a forward pass; with --tokens_per_batch, only in evaluation"
    )
    tokens_per_batch: int | None = flag(
        None,
        "maximum number of tokens per device in a forward pass, padding included, instead of "
        "--per_device_train_batch_size; if not given: not used",
    )
    gradient_accumulation_steps: int = flag(1, "forward and backward passes per optimizer step")
    learning_rate: float | None = flag(
        None, "peak learning rate; if not given: 3e-5 for a pretrained model, 3e-3 x 128 / d_model for a new model"
    )
    recurrence_learning_rate: float | None = flag(
        None,
        "peak learning rate of the recurrence and of adapters; if not given: 10 x --learning_rate for a pretrained "
        "model, else --learning_rate",
    )
    lr_scheduler: str = flag(
        "linear",
        "decay of the learning rate after warm-up, as in Hugging Face's Trainer: linear or cosine (to 0 at "
        "the last step), inverse_sqrt, or constant (constant_with_warmup is the same)",
        aliases=["--lr_scheduler_type"],
    )
    warmup_steps: int | None = flag(
        None,
        "optimizer steps over which the learning rate rises linearly to its peak; if not given: --warmup_ratio",
    )
    warmup_ratio: float | None = flag(
        None,
        "share of the run's steps over which the learning rate rises, from 0 to 1, instead of --warmup_steps; if not "
        "given: 0.1, rounded down",
    )
    weight_decay: float = flag(
        0.01, "weight decay of matrices; biases, norms and gates of attention heads do not decay"
    )
    adam_beta2: float = flag(
        0.999,
        "Adam's beta2, the decay rate of the mean of squared gradients, from 0 to below 1; lower values forget a "
        "large gradient sooner",
    )
    label_smoothing_factor: float = flag(
        0.0,
        "share of each target token that the training loss spreads over the vocabulary, from 0 to below 1; the "
        "validation loss has no smoothing",
    )
    max_grad_norm: float = flag(1.0, "norm to which gradients are clipped; 0: no clipping")
    precision: str = flag(
        "auto", "precision of weights and activations: bf16, fp32 or auto (bf16 if the GPU supports it, else fp32)"
    )
    gradient_checkpointing: str = flag(
        "none", "part of the model that is recomputed in the backward pass to save memory: none, layer or segment"
    )
    oracle: str = flag(
        "none",
        "words of the model that replace some of the target's words in the decoder's input (scheduled sampling): word "
        "(best next word), sentence (text from a beam search, slower) or none",
    )
    oracle_decay: float = flag(
        10.0,
        "decay mu of the share of target words in the decoder's input with --oracle: mu / (mu + exp(epoch / mu)); at "
        "least 1",
    )
    oracle_temperature: float = flag(1.0, "scale of the Gumbel noise on the word scores of --oracle; 0: no noise")
    oracle_beams: int = flag(3, "beams of the search with --oracle sentence")
    curriculum: str | None = flag(
        None,
        "maximum number of segments of a document in each training stage, for example 1,2,4,8; each step draws a "
        "number from 1 to this limit; if not given: no stages",
    )
    curriculum_steps: int | None = flag(
        None,
        "optimizer steps after which a stage of --curriculum ends in any case; if not given: steps of the run / "
        "number of stages",
    )
    curriculum_loss: float | None = flag(
        None,
        "training loss at which a stage of --curriculum ends early, checked at each line of the log; if not given: "
        "not checked",
    )
    seed: int = flag(42, "seed of initial weights, dropout and document order")
    log_every: int = flag(10, "optimizer steps between two lines of the log")
    eval_every: int = flag(
        0,
        "optimizer steps between two evaluations, each followed by a checkpoint; 0: a tenth of the run's steps, at "
        "least 25",
    )
    save_every: int = flag(
        0, "optimizer steps between two checkpoints, in addition to those at evaluations; 0: only at evaluations"
    )
    max_train_documents: int | None = flag(
        None,
        "maximum number of training documents, drawn with a fixed seed that does not depend on --seed; if not given: "
        "all",
        aliases=["--max_train_samples"],
    )
    max_eval_documents: int | None = flag(
        None,
        "maximum number of validation documents, drawn with a fixed seed; if not given: all",
        aliases=["--max_eval_samples"],
    )
    eval_documents: int = flag(
        32,
        "validation documents for which an evaluation generates texts; the validation loss uses all (or "
        "--max_eval_documents)",
    )
    per_device_eval_batch_size: int | None = flag(
        None, "documents per device in a forward pass of an evaluation; if not given: --per_device_train_batch_size"
    )
    metric_for_best_model: str = flag(
        "loss",
        "metric of evaluations that chooses the best model, which is saved: loss (the lowest validation loss), or "
        "rouge1, rouge2, rougeL or rougeLsum (the highest)",
    )
    patience: int = flag(
        0, "stop the run after this many evaluations in a row without a better --metric_for_best_model; 0: never"
    )
    async_save: bool = flag(
        False, "write checkpoints in the background from a copy in CPU memory, while training goes on"
    )
    keep_last: int = flag(
        2,
        "number of newest checkpoints to keep, at least 2; the checkpoint with the best --metric_for_best_model is "
        "kept too",
    )
    keep_every: int = flag(0, "keep also the checkpoints at multiples of this number of optimizer steps; 0: none")
    trust_checkpoint: bool = flag(
        False, "resume from a checkpoint without a manifest or outside the run's folder, whose files cannot be verified"
    )
    dataloader_num_workers: int = flag(
        2, "processes per device that prepare batches; 0: the training process prepares them"
    )
    max_skipped_steps: int = flag(
        10, "steps in a row without a finite gradient after which the run writes a checkpoint and ends"
    )
    max_loss_spikes: int = flag(
        0, "lines of the log in a row with a loss far above the median after which the run ends; 0: never"
    )
    max_minutes: float | None = flag(
        None,
        "minutes after the start of the process at which the run writes a checkpoint and stops; if not given: no limit",
    )
    timeout_minutes: int = flag(
        60,
        "longest time in minutes that a process waits for another one, at the start, in evaluations and in checkpoints",
    )
    step_timeout_seconds: int = flag(
        600, "longest time in seconds that a process waits for another one within a step, except the first step"
    )
    local_rank: int = flag(-1, "rank of the process on its host; set by the deepspeed launcher")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("per_device_train_batch_size", "gradient_accumulation_steps", "log_every")
        check_at_least(self, 1, *positive, "eval_documents", "timeout_minutes")
        self._check_length()
        check_at_least(self, 0, "max_minutes", "max_loss_spikes")
        check_at_least(self, 1, "max_skipped_steps", "step_timeout_seconds", "tokens_per_batch")
        check_at_least(self, 1, "max_train_documents", "max_eval_documents")
        check_at_least(self, 1, "per_device_eval_batch_size", "oracle_decay", "oracle_beams")
        check_at_least(
            self, 0, "learning_rate", "recurrence_learning_rate", "warmup_steps", "weight_decay", "eval_every"
        )
        check_at_least(self, 0, "save_every", "keep_every")
        check_at_least(self, 0, "max_grad_norm", "patience", "dataloader_num_workers", "seed", "oracle_temperature")
        check_at_least(self, 0, "adam_beta2")
        check_below(self, 1, "adam_beta2")
        check_at_least(self, 0, "label_smoothing_factor")
        check_below(self, 1, "label_smoothing_factor")
        if self.label_smoothing_factor and self.curriculum_loss:
            raise ValueError(
                "--curriculum_loss: is compared with the smoothed loss, which has a high floor; use --curriculum_steps "
                "with --label_smoothing_factor"
            )
        # keep two checkpoints, because a crash may leave the newest one incomplete
        check_at_least(self, 2, "keep_last")
        check_choice(self, "metric_for_best_model", BEST_METRICS)
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "lr_scheduler", LR_SCHEDULERS)
        check_choice(self, "gradient_checkpointing", CHECKPOINTING_GRAINS)
        check_choice(self, "oracle", ORACLES)
        check_at_least(self, 1, "curriculum_steps")
        if self.curriculum is None and (self.curriculum_steps or self.curriculum_loss is not None):
            raise ValueError("--curriculum_steps and --curriculum_loss need --curriculum")
        # raises ValueError if the stages cannot be parsed
        self.build_curriculum()

    def _check_length(self) -> None:
        if self.max_steps != NOT_GIVEN["max_steps"]:
            check_at_least(self, 1, "max_steps")
            if self.warmup_steps is not None and self.warmup_steps > self.max_steps:
                raise ValueError(f"--warmup_steps {self.warmup_steps}: must be at most --max_steps {self.max_steps}")
        check_above(self, 0, "num_train_epochs")
        check_at_least(self, 0, "warmup_ratio")
        check_at_most(self, 1, "warmup_ratio")
        for name, other in ALTERNATIVES.items():
            values = getattr(self, name), getattr(self, other)
            if values[0] != NOT_GIVEN.get(name) and values[1] != NOT_GIVEN.get(other):
                raise ValueError(f"--{name} {values[0]} and --{other} {values[1]}: give only one of the two flags")

    def of_length(self, max_steps: int) -> "RunArguments":
        """Return the arguments of a run with `max_steps` steps, with the settings that follow from this number."""
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            share = self.warmup_ratio
            warmup_steps = max_steps // 10 if share is None else math.ceil(share * max_steps)
        return replace(
            self,
            max_steps=max_steps,
            num_train_epochs=None,
            warmup_steps=warmup_steps,
            warmup_ratio=None,
            eval_every=self.eval_every or max(25, max_steps // 10),
        )

    def most_documents(self) -> dict[str, int | None]:
        """Return the largest number of documents of each split; None: all."""
        return {"train": self.max_train_documents, "validation": self.max_eval_documents}

    def build_curriculum(self) -> Curriculum | None:
        """Return the curriculum, or None without `--curriculum`. Raise ValueError if its stages do not grow."""
        if self.curriculum is None:
            return None
        stages = parse_stages(self.curriculum)
        return Curriculum(stages, self.curriculum_steps or max(1, self.max_steps // len(stages)), self.seed)
