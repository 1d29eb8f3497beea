"""What a run is told on the command line. One dataclass for each concern; every field is a flag."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.held_out import SPLIT_RULES
from recurrent_bart.data.rows import TASKS, Columns
from recurrent_bart.data.sources import EMBEDDED
from recurrent_bart.data.text_files import check_encoding
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS
from recurrent_bart.model.scheduled_sampling import ORACLES
from recurrent_bart.monitoring.wandb_tracker import WANDB_MODES
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.curriculum import Curriculum, parse_stages
from recurrent_bart.training.flags import DataclassFlagParser
from recurrent_bart.training.resumed_flags import check_resumed

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("linear", "cosine", "constant")
TRAINED = ("all", "prefix")


def flag(default: Any, text: str) -> Any:
    """A field with its line of documentation."""
    return field(default=default, metadata={"help": text})


def _check_at_least(arguments: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        # so that nan is refused too
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value}: must be at least {least:g}")


def _check_below(arguments: Any, limit: float, name: str) -> None:
    value = getattr(arguments, name)
    if value is not None and value >= limit:
        raise ValueError(f"--{name} {value}: must be below {limit:g}")


def _check_choice(arguments: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(arguments, name) not in allowed:
        raise ValueError(f"--{name} {getattr(arguments, name)}: allowed are {', '.join(allowed)}")


@dataclass
class ModelArguments:
    """Which model; what is not given stays as the checkpoint or RecurrentBartConfig has it."""

    model_name_or_path: str | None = flag(None, "pretrained BART or Recurrent BART; without it, one from scratch")
    model_size: str = flag("tiny", "size of a model from scratch: tiny, small, base or large")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the model's own")
    trust_remote_code: bool = flag(False, "run the code that a tokenizer's folder or repository brings along")
    vocab_size: int = flag(4096, "ids of a tokenizer trained for a model from scratch")
    pre_seq_len: int | None = flag(None, "prefix positions and slots, the width of the state; 0: no recurrence")
    segment_size: int | None = flag(None, "tokens of a segment")
    input_size: int | None = flag(None, "token positions the encoder sees per segment; more than segment_size: overlap")
    max_n_segments: int | None = flag(8, "segments kept per document in training and its evaluations; -1: all")
    bptt_depth: int | None = flag(None, "segment boundaries that gradient crosses; -1: all")
    prefix_projection: bool | None = flag(None, "project the state by an MLP, not by the layer's own k_proj, v_proj")
    prefix_hidden_size: int | None = flag(None, "width of that MLP")
    hidden_dropout_prob: float | None = flag(None, "dropout on the projected prefix")
    recurrence: str | None = flag(None, "layerwise: a state per layer; top: one, from the top to the bottom; none")
    prefix_attention: str | None = flag(None, "gated or concat")
    decoder_context: str | None = flag(
        None, "what the decoder sees: last, memory, section or all segments; of a new model section for --task sections"
    )
    context_segments: int | None = flag(None, "segments that memory, section and all show, the last ones; -1: all")
    update_gate: bool | None = flag(None, "carry the state over through a learned gate")
    associative_memory: bool | None = flag(None, "beside the slots, a matrix per head from tokens' keys to values")
    matrix_gate_init: float | None = flag(None, "its gates before training; 0: closed, 1: open, from scratch")
    schedule: str | None = flag(None, "order of computation: sequential, wavefront (by diagonals) or auto, the faster")
    dropout: float | None = flag(None, "BART's dropout")
    train: str = flag("all", "all: every parameter; prefix: the recurrence's alone, the rest stays as it is")
    lora_r: int = flag(0, "rank of adapters on q_proj and v_proj, trained beside the recurrence (needs peft); 0: none")
    lora_alpha: int | None = flag(None, "what they are scaled by, over lora_r; default: twice lora_r")

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "dropout")
        _check_below(self, 1, "dropout")
        _check_choice(self, "train", TRAINED)
        _check_at_least(self, 0, "lora_r")
        _check_at_least(self, 1, "lora_alpha")
        if self.lora_r and self.train != "all":
            raise ValueError(f"--lora_r {self.lora_r}: adapters are not trained with --train {self.train}")
        if self.train == "prefix" and self.pre_seq_len == 0:
            raise ValueError("--train prefix: with --pre_seq_len 0 there is no prefix to train")

    def lora_strength(self) -> int:
        """What the adapters' part is scaled by, over `lora_r`."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    def config_fields(self) -> dict[str, Any]:
        """Fields of RecurrentBartConfig that were given."""
        names = {item.name for item in fields(self)} & set(RecurrentBartConfig.__dataclass_fields__) - {"vocab_size"}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """Which documents, and what they are summarised by."""

    dataset: str = flag("stdlib", "stdlib, a file, a folder with train.* and validation.*, or a name on the hub")
    train_file: str | None = flag(None, "JSON Lines (.gz), CSV, Parquet, or a folder of texts; instead of dataset")
    validation_file: str | None = flag(None, "likewise; without one, a tenth or so of the training documents")
    test_file: str | None = flag(None, "likewise")
    group_column: str | None = flag(None, "column that documents of one group share; a group is never split")
    validation_share: float = flag(0.1, "share of the training documents held out, if there is no validation split")
    held_out_by: str = flag("content", "what decides that: the id or content, or the id or line as older runs did")
    encoding: str = flag("utf-8", "encoding of JSON Lines, CSV and texts, by its name in Python")
    task: str = flag("document", "document: one target per document; sections: one per section")
    text_column: str = flag(Columns.text, "column of the text")
    summary_column: str = flag(Columns.summary, "column of the target")
    sections_column: str = flag(Columns.sections, "column of the list of texts")
    summaries_column: str = flag(Columns.summaries, "column of the list of targets")
    gap_sentences: int = flag(
        0, "times each training document comes again, with targets of its own sentences, kept or taken out (PEGASUS)"
    )
    max_target_length: int = flag(128, "tokens of a target; longer ones are cut, and generation stops there")
    skip_bad_samples: bool = flag(False, "pass over documents that are unreadable or empty, and count them")
    cache_dir: str = flag("~/.cache/recurrent_bart", "folder of tokenised documents and trained tokenizers")

    def __post_init__(self) -> None:
        _check_choice(self, "task", TASKS)
        _check_choice(self, "held_out_by", SPLIT_RULES)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share {self.validation_share}: must be above 0 and below 1")
        check_encoding(self.encoding)
        _check_at_least(self, 4, "max_target_length")
        _check_at_least(self, 0, "gap_sentences")

    def columns(self) -> Columns:
        """Names of the fields to read."""
        return Columns(
            self.text_column, self.summary_column, self.sections_column, self.summaries_column, self.group_column
        )


@dataclass(kw_only=True)
class GenerationArguments:
    """Settings of generation beside its length and beams; a setting that is not given is the model's."""

    min_new_tokens: int | None = flag(None, "fewest tokens of a generated text, 0: any; default: as the model has it")
    no_repeat_ngram_size: int | None = flag(
        None, "no text has a sequence of this many tokens twice, 0: it may; default: as the model has it"
    )
    length_penalty: float | None = flag(
        None, "exponent of the length in beam search, higher: longer texts; default: as the model has it"
    )

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "min_new_tokens", "no_repeat_ngram_size")

    def generation_settings(self) -> dict[str, Any]:
        """Return the settings that were given."""
        values = {item.name: getattr(self, item.name) for item in fields(GenerationArguments)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class RunArguments(GenerationArguments):
    """How it is trained."""

    output_dir: str | None = flag(None, "run folder; without it, a new one under runs/")
    resume: str | None = flag(None, "run folder to continue from its last checkpoint, with its flags")
    deepspeed: str | None = flag(None, "DeepSpeed configuration; without it, ds_configs/zero2.json")
    max_steps: int = flag(50, "optimizer steps")
    per_device_train_batch_size: int = flag(8, "documents of a forward pass; with tokens_per_batch, in evaluation")
    tokens_per_batch: int | None = flag(
        None, "tokens of a forward pass, padding included, instead of documents: many short ones, few long ones"
    )
    gradient_accumulation_steps: int = flag(1, "forward passes of an optimizer step")
    learning_rate: float | None = flag(None, "highest one; default: 3e-5 pretrained, 3e-3 x 128 / d_model from scratch")
    recurrence_learning_rate: float | None = flag(None, "the recurrence's own; default: 10 times it where pretrained")
    lr_scheduler: str = flag("linear", "decay after warm-up: linear, cosine or constant")
    warmup_steps: int | None = flag(None, "steps over which the learning rate rises from 0; default: a tenth of all")
    weight_decay: float = flag(0.01, "of matrices; biases, norms and gates of attention heads have none")
    adam_beta2: float = flag(
        0.999, "what a step keeps of the mean of squared gradients; lower: a large one is sooner forgotten"
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: not at all")
    precision: str = flag("auto", "auto: bf16 where the device has it, fp32 elsewhere; or bf16, fp32")
    gradient_checkpointing: str = flag("none", "recompute each layer or segment in the backward pass; or none")
    oracle: str = flag("none", "whose words the decoder reads beside the target's: word, sentence (slower) or none")
    oracle_decay: float = flag(10.0, "mu: the target's share of them is mu / (mu + exp(epoch / mu))")
    oracle_temperature: float = flag(1.0, "scale of the Gumbel noise on the oracle's scores; 0: none")
    oracle_beams: int = flag(3, "beams of the search for the sentence nearest to the target")
    curriculum: str | None = flag(
        None, "most segments of a document stage by stage, such as 1,2,4,8; each step draws a number from 1 to it"
    )
    curriculum_steps: int | None = flag(None, "steps that end a stage in any case; default: all stages the same")
    curriculum_loss: float | None = flag(None, "training loss, of a line of the log, that ends a stage before that")
    seed: int = flag(42, "of weights, dropout and data order")
    log_every: int = flag(10, "steps between lines of the log")
    eval_every: int = flag(
        0, "steps between evaluations, with a checkpoint at each; default: a tenth of all, at least 25"
    )
    save_every: int = flag(0, "steps between checkpoints beside those written at evaluations; 0: none")
    eval_documents: int = flag(32, "validation documents that are summarised at an evaluation; all count for the loss")
    per_device_eval_batch_size: int | None = flag(None, "documents of a pass in evaluation; default: as in training")
    num_beams: int = flag(1, "beams of generation in evaluation")
    patience: int = flag(0, "stop after so many evaluations without a lower validation loss; 0: never")
    async_save: bool = flag(False, "write a checkpoint while training goes on, from a copy in the processor's memory")
    keep_last: int = flag(2, "checkpoints kept, beside that of the lowest validation loss")
    keep_every: int = flag(0, "checkpoints at multiples of so many steps are kept too; 0: none")
    trust_checkpoint: bool = flag(False, "resume from files that no manifest vouches for")
    dataloader_num_workers: int = flag(2, "processes that make batches")
    max_skipped_steps: int = flag(10, "so many steps in a row without a finite gradient end it, with a checkpoint")
    max_loss_spikes: int = flag(0, "so many lines of the log in a row with a loss far above the median end it; 0: none")
    max_minutes: float | None = flag(None, "stop so long after the start, with a checkpoint to resume from")
    timeout_minutes: int = flag(60, "how long a process waits for another one before it gives up")
    step_timeout_seconds: int = flag(
        600, "likewise within a step after the first, evaluations and checkpoints left out"
    )
    local_rank: int = flag(-1, "set by the deepspeed launcher")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "log_every")
        _check_at_least(self, 1, *positive, "eval_documents", "num_beams", "timeout_minutes")
        _check_at_least(self, 0, "max_minutes", "max_loss_spikes")
        _check_at_least(self, 1, "max_skipped_steps", "step_timeout_seconds", "tokens_per_batch")
        _check_at_least(self, 1, "per_device_eval_batch_size", "oracle_decay", "oracle_beams")
        _check_at_least(
            self, 0, "learning_rate", "recurrence_learning_rate", "warmup_steps", "weight_decay", "eval_every"
        )
        _check_at_least(self, 0, "save_every", "keep_every")
        _check_at_least(self, 0, "max_grad_norm", "patience", "dataloader_num_workers", "seed", "oracle_temperature")
        _check_at_least(self, 0, "adam_beta2")
        _check_below(self, 1, "adam_beta2")
        # one may be half written when the next is due
        _check_at_least(self, 2, "keep_last")
        _check_choice(self, "precision", PRECISIONS)
        _check_choice(self, "lr_scheduler", SCHEDULES)
        _check_choice(self, "gradient_checkpointing", CHECKPOINTING_GRAINS)
        _check_choice(self, "oracle", ORACLES)
        self.eval_every = self.eval_every or max(25, self.max_steps // 10)
        if self.warmup_steps is None:
            self.warmup_steps = self.max_steps // 10
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps}: must be at most --max_steps {self.max_steps}")
        _check_at_least(self, 1, "curriculum_steps")
        if self.curriculum is None and (self.curriculum_steps or self.curriculum_loss is not None):
            raise ValueError("--curriculum_steps and --curriculum_loss need --curriculum")
        # what cannot be read is found here
        self.build_curriculum()

    def build_curriculum(self) -> Curriculum | None:
        """How many segments documents have at each step; None: as many as ever.

        Raises:
            ValueError: Its stages are no growing numbers.
        """
        if self.curriculum is None:
            return None
        stages = parse_stages(self.curriculum)
        return Curriculum(stages, self.curriculum_steps or max(1, self.max_steps // len(stages)), self.seed)


@dataclass
class TrackingArguments:
    """Where the figures of a run go beside its folder."""

    wandb_mode: str = flag(
        "auto", "online, offline or disabled; auto: as WANDB_MODE says, else online if there is a key, else offline"
    )
    wandb_entity: str | None = flag(None, "wandb user or team; default: WANDB_ENTITY, else the owner of the key")
    wandb_project: str | None = flag(None, "wandb project; default: WANDB_PROJECT, else recurrent-bart")
    wandb_group: str | None = flag(
        None, "runs that wandb shows together; default: WANDB_RUN_GROUP, else the name of the run folder"
    )
    wandb_tags: str = flag("", "wandb tags, separated by commas; default: WANDB_TAGS")
    tensorboard: bool = flag(False, "write curves for TensorBoard too (needs tensorboardX)")

    def __post_init__(self) -> None:
        _check_choice(self, "wandb_mode", ("auto", *WANDB_MODES))

    def tags(self) -> list[str]:
        """Return each tag of `wandb_tags`."""
        return split_tags(self.wandb_tags)


def split_tags(text: str) -> list[str]:
    """Return the tags of a text that separates them by commas."""
    return [tag.strip() for tag in text.split(",") if tag.strip()]


@dataclass
class Arguments:
    """All of a run's arguments."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    tracking: TrackingArguments


def build_parser() -> DataclassFlagParser:
    """Return the parser of all flags."""
    kinds = [ModelArguments, DataArguments, RunArguments, TrackingArguments]
    return DataclassFlagParser(kinds, description="Train Recurrent BART.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read a command line. With `--resume RUN`, flags that are not given are as they were in that run.

    Raises:
        ValueError: A flag is unknown or out of range, there is no run to resume, or it cannot take a flag over.
    """
    parser = build_parser()
    known = parser.parse_flags(argv)
    given = given_flags(argv)
    folder = given.get("resume")
    if folder:
        parser.set_defaults(**_flags_of_run(folder, vars(known).keys(), given))
    arguments = Arguments(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))
    _make_paths_absolute(arguments)
    if folder:
        if Path(arguments.run.output_dir or "").absolute() != Path(folder).absolute():
            raise ValueError(
                f"--output_dir {arguments.run.output_dir}: a run that is resumed goes on in its own folder"
            )
        check_resumed(asdict(arguments), RunFolder(Path(folder)).read_config())
    return arguments


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the flags that a command line gives, without defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args(argv)[0])


def _flags_of_run(folder: str, known: Iterable[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a run that still exist; trust is given anew each time."""
    saved = RunFolder(Path(folder)).read_config().get("arguments", {})
    kept = set(known) - {"trust_checkpoint", "trust_remote_code"}
    saved = {group: data_flags(values) if group == "data" else values for group, values in saved.items()}
    flags = {name: value for group in saved.values() for name, value in group.items() if name in kept}
    if "max_steps" in given and flags.get("warmup_steps") is not None:
        # resolved when the run began, for a run that was longer
        flags["warmup_steps"] = min(flags["warmup_steps"], given["max_steps"])
    return flags | {"resume": folder, "output_dir": folder}


def _make_paths_absolute(arguments: Arguments) -> None:
    """Make paths hold from every folder; names on the hub and paths that lead nowhere stay as they are."""
    for group, names in (
        (arguments.model, ("model_name_or_path", "tokenizer_name")),
        (arguments.data, ("dataset", "train_file", "validation_file", "test_file", "cache_dir")),
        (arguments.run, ("deepspeed",)),
    ):
        for name in names:
            value = getattr(group, name)
            # the cache is made where it is not there yet
            if value not in (None, EMBEDDED) and (name == "cache_dir" or Path(value).expanduser().exists()):
                setattr(group, name, str(Path(value).expanduser().absolute()))


def data_flags(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the data flags of a run; one that is older than `--held_out_by` held out by line."""
    return {"held_out_by": "line"} | saved
