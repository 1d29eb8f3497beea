"""Command-line arguments of a run. There is one dataclass per concern, and every field is a flag."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.held_out import SPLIT_RULES
from recurrent_bart.data.rows import TASKS, Columns
from recurrent_bart.data.stdlib import EMBEDDED
from recurrent_bart.data.text_files import check_encoding
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS
from recurrent_bart.model.scheduled_sampling import ORACLES
from recurrent_bart.monitoring.wandb_tracker import WANDB_MODES
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.curriculum import Curriculum, parse_stages
from recurrent_bart.training.flags import DataclassFlagParser
from recurrent_bart.training.generation_arguments import GenerationArguments, check_at_least, flag
from recurrent_bart.training.resumed_flags import check_resumed

PRECISIONS = ("auto", "bf16", "fp32")
LR_SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
TRAINED = ("all", "prefix")


def _check_below(arguments: Any, limit: float, name: str) -> None:
    value = getattr(arguments, name)
    if value is not None and value >= limit:
        raise ValueError(f"--{name} {value}: must be below {limit:g}")


def _check_choice(arguments: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(arguments, name) not in allowed:
        raise ValueError(f"--{name} {getattr(arguments, name)}: allowed are {', '.join(allowed)}")


@dataclass
class ModelArguments:
    """Flags of the model. Without a flag, the pretrained model's value or RecurrentBartConfig's default holds."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = flag(
        None,
        "path or Hugging Face Hub name of a pretrained BART or Recurrent BART; if not given: a new model of size "
        "--model_size",
    )
    model_size: str = flag(
        "tiny", "size of a new model: tiny, small, base or large; not used with --model_name_or_path"
    )
    tokenizer_name: str | None = flag(
        None,
        "path or Hugging Face Hub name of a tokenizer; if not given: the pretrained model's tokenizer, or one trained "
        "on the training documents",
    )
    trust_remote_code: bool = flag(False, "run Python code that is stored beside the tokenizer")
    vocab_size: int = flag(4096, "number of ids of a tokenizer that is trained for a new model")
    pre_seq_len: int | None = flag(
        None,
        "number of prefix positions per segment, and of slots in the state; 0: no recurrence; if not given: the "
        "pretrained model's value, else 20",
    )
    segment_size: int | None = flag(
        None,
        "tokens per segment, special tokens included; if not given: the pretrained model's value, else 512 (256 for "
        "--model_size tiny)",
    )
    input_size: int | None = flag(
        None,
        "token positions that the encoder reads per segment; positions beyond --segment_size repeat the end of the "
        "previous segment; if not given: --segment_size",
    )
    max_n_segments: int | None = flag(
        8, "segments read per document in training and its evaluations; longer documents are cut; -1: all"
    )
    bptt_depth: int | None = flag(
        None,
        "number of segment boundaries that gradients cross (truncated BPTT); 0: none; -1: all; if not given: a "
        "Recurrent BART's value, else -1 for a new model with one target per document, else 2",
    )
    prefix_projection: bool | None = flag(
        None,
        "compute the prefix keys and values from the state with an MLP; if false, with the layer's k_proj and v_proj; "
        "if not given: the pretrained model's value, else true",
    )
    prefix_hidden_size: int | None = flag(
        None, "hidden width of the MLP of --prefix_projection; if not given: the pretrained model's value, else 512"
    )
    hidden_dropout_prob: float | None = flag(
        None,
        "dropout probability on the projected prefix, from 0 to below 1; if not given: the pretrained model's value, "
        "else 0.1",
    )
    recurrence: str | None = flag(
        None,
        "layerwise: one state per layer; top: one state, passed from the last layer to the first layer of the next "
        "segment; none: no state; if not given: the pretrained model's value, else layerwise",
    )
    prefix_attention: str | None = flag(
        None,
        "concat: one softmax over prefix and tokens; gated: a separate softmax over the prefix, added through a gate "
        "per head; if not given: the pretrained model's value, else concat",
    )
    decoder_context: str | None = flag(
        None,
        "encoder output that the decoder attends to: last (tokens of the last segment), memory (states of all "
        "segments and tokens of the last), section (tokens since the previous target) or all (tokens of all "
        "segments); if not given: a Recurrent BART's value, else all, or section with --task sections",
    )
    context_segments: int | None = flag(
        None,
        "with --decoder_context memory, section or all, show the decoder only the last N segments; -1: all; if not "
        "given: the pretrained model's value, else -1",
    )
    update_gate: bool | None = flag(
        None,
        "update the state through a learned gate; if false, replace it; if not given: the pretrained model's value, "
        "else true",
    )
    associative_memory: bool | None = flag(
        None,
        "add to each layer a matrix per head that maps the keys of earlier tokens to their values; needs --recurrence "
        "layerwise; if not given: the pretrained model's value, else false",
    )
    matrix_gate_init: float | None = flag(
        None,
        "initial value of the gates of --associative_memory; 0: closed; 1: open, better for a new model; if not "
        "given: the pretrained model's value, else 0",
    )
    schedule: str | None = flag(
        None,
        "order of the encoder's computation: sequential (segment by segment), wavefront (independent segments and "
        "layers at once) or auto (the faster); if not given: the pretrained model's value, else auto",
    )
    dropout: float | None = flag(
        None, "BART's dropout probability, from 0 to below 1; if not given: the pretrained model's value, else 0.1"
    )
    train: str = flag("all", "trained parameters: all, or prefix (only the recurrence)")
    lora_r: int = flag(
        0,
        "rank of low-rank adapters on q_proj and v_proj, trained together with the recurrence; needs the package "
        "peft; 0: no adapters",
    )
    lora_alpha: int | None = flag(
        None,
        "scale of the adapters of --lora_r: their output is multiplied by lora_alpha / lora_r; if not given: 2 x "
        "lora_r",
    )

    def __post_init__(self) -> None:
        check_at_least(self, 0, "dropout")
        _check_below(self, 1, "dropout")
        _check_choice(self, "train", TRAINED)
        check_at_least(self, 0, "lora_r")
        check_at_least(self, 1, "lora_alpha")
        if self.lora_r and self.train != "all":
            raise ValueError(
                f"--lora_r {self.lora_r}: must be 0 with --train {self.train}, which does not train adapters"
            )
        if self.train == "prefix" and self.pre_seq_len == 0:
            raise ValueError("--train prefix: needs --pre_seq_len of at least 1")

    def lora_strength(self) -> int:
        """Return LoRA's alpha: the adapters' output is multiplied by alpha / `lora_r`."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    def config_fields(self) -> dict[str, Any]:
        """Return the given flags that are fields of RecurrentBartConfig."""
        names = {item.name for item in fields(self)} & set(RecurrentBartConfig.__dataclass_fields__) - {"vocab_size"}
        return {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """Flags of the documents and their targets."""

    _argument_group_name: ClassVar[str] = "documents"

    dataset: str = flag(
        "stdlib",
        "documents: stdlib (built-in corpus), a file, a folder with train.* and validation.*, a folder written by "
        "save_to_disk, or a data set's name on the Hugging Face Hub",
    )
    dataset_config_name: str | None = flag(
        None,
        "configuration of the data set that --dataset names on the Hugging Face Hub; if not given: its only one",
    )
    train_file: str | None = flag(
        None,
        "training documents, instead of --dataset: JSON Lines (.jsonl or .jsonl.gz), a JSON list, CSV, TSV, Parquet, "
        "a folder of text files, or a folder written by save_to_disk",
    )
    validation_file: str | None = flag(
        None,
        "validation documents, in the formats of --train_file; if not given: a share of the training documents "
        "(--validation_share)",
    )
    test_file: str | None = flag(
        None,
        "test documents, in the formats of --train_file; if not given: the test split of --dataset, if there is one",
    )
    group_column: str | None = flag(
        None,
        "column with the name of a document's group; all documents of a group stay in the same split; if not given: "
        "no groups",
    )
    validation_share: float = flag(
        0.1, "share of the training documents held out for validation if there is no validation split, between 0 and 1"
    )
    held_out_by: str = flag(
        "content",
        "rule that chooses the documents of --validation_share: content (by id or content), or line (by id or line "
        "number, as in older runs)",
    )
    encoding: str = flag("utf-8", "character encoding of JSON, CSV, TSV and text files, by its Python name")
    task: str = flag("document", "document: one target per document; sections: one target per section")
    text_column: str = flag(Columns.text, "column with the text of a document, for --task document")
    summary_column: str = flag(Columns.summary, "column with the target of a document, for --task document")
    sections_column: str = flag(Columns.sections, "column with the list of section texts, for --task sections")
    summaries_column: str = flag(Columns.summaries, "column with the list of section targets, for --task sections")
    gap_sentences: int = flag(
        0,
        "copies of each training document whose targets are sentences of the document, left in or removed from the "
        "text (PEGASUS); 0: none",
    )
    max_target_length: int = flag(
        128,
        "most tokens of a target, at least 4; longer targets are cut; generation stops at this length, unless "
        "--max_new_tokens is given",
    )
    skip_bad_samples: bool = flag(
        False, "skip documents that are unreadable or empty, and count them; if not given: the run stops at the first"
    )
    cache_dir: str = flag(
        "~/.cache/recurrent_bart", "folder in which tokenised documents and trained tokenizers are cached"
    )

    def __post_init__(self) -> None:
        _check_choice(self, "task", TASKS)
        _check_choice(self, "held_out_by", SPLIT_RULES)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"--validation_share {self.validation_share}: must be above 0 and below 1")
        check_encoding(self.encoding)
        check_at_least(self, 4, "max_target_length")
        check_at_least(self, 0, "gap_sentences")

    def columns(self) -> Columns:
        """Return the names of the columns to read."""
        return Columns(
            self.text_column, self.summary_column, self.sections_column, self.summaries_column, self.group_column
        )


@dataclass
class RunArguments(GenerationArguments):
    """Flags of training, evaluation and checkpoints."""

    _argument_group_name: ClassVar[str] = "training, evaluation and generation"

    output_dir: str | None = flag(None, "folder of the run; if not given: a new folder under runs/")
    resume: str | None = flag(
        None, "folder of a run to continue from its last checkpoint; flags that are not given keep the run's values"
    )
    deepspeed: str | None = flag(None, "path of a DeepSpeed configuration in JSON; if not given: ds_configs/zero2.json")
    max_steps: int = flag(50, "optimizer steps of the run, including the steps before --resume")
    per_device_train_batch_size: int = flag(
        8, "documents per device in a forward pass; with --tokens_per_batch, only in evaluation"
    )
    tokens_per_batch: int | None = flag(
        None,
        "most tokens per device in a forward pass, padding included, instead of --per_device_train_batch_size; if not "
        "given: not used",
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
        "--max_steps), inverse_sqrt, or constant (constant_with_warmup is the same)",
        aliases=["--lr_scheduler_type"],
    )
    warmup_steps: int | None = flag(
        None,
        "optimizer steps over which the learning rate rises linearly to its peak; if not given: a tenth of --max_steps",
    )
    weight_decay: float = flag(
        0.01, "weight decay of matrices; biases, norms and gates of attention heads do not decay"
    )
    adam_beta2: float = flag(
        0.999,
        "Adam's beta2, the decay rate of the mean of squared gradients, from 0 to below 1; lower values forget a "
        "large gradient sooner",
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
        "most segments of a document in each training stage, for example 1,2,4,8; each step draws a number from 1 to "
        "this limit; if not given: no stages",
    )
    curriculum_steps: int | None = flag(
        None,
        "optimizer steps after which a stage of --curriculum ends in any case; if not given: --max_steps / number of "
        "stages",
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
        "optimizer steps between two evaluations, each followed by a checkpoint; 0: a tenth of --max_steps, at least "
        "25",
    )
    save_every: int = flag(
        0, "optimizer steps between two checkpoints, in addition to those at evaluations; 0: only at evaluations"
    )
    eval_documents: int = flag(
        32, "validation documents for which an evaluation generates texts; the validation loss uses all documents"
    )
    per_device_eval_batch_size: int | None = flag(
        None, "documents per device in a forward pass of an evaluation; if not given: --per_device_train_batch_size"
    )
    patience: int = flag(0, "evaluations in a row without a lower validation loss after which the run stops; 0: never")
    async_save: bool = flag(
        False, "write checkpoints in the background from a copy in CPU memory, while training goes on"
    )
    keep_last: int = flag(
        2,
        "number of newest checkpoints to keep, at least 2; the checkpoint with the lowest validation loss is kept too",
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
        positive = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "log_every")
        check_at_least(self, 1, *positive, "eval_documents", "timeout_minutes")
        check_at_least(self, 0, "max_minutes", "max_loss_spikes")
        check_at_least(self, 1, "max_skipped_steps", "step_timeout_seconds", "tokens_per_batch")
        check_at_least(self, 1, "per_device_eval_batch_size", "oracle_decay", "oracle_beams")
        check_at_least(
            self, 0, "learning_rate", "recurrence_learning_rate", "warmup_steps", "weight_decay", "eval_every"
        )
        check_at_least(self, 0, "save_every", "keep_every")
        check_at_least(self, 0, "max_grad_norm", "patience", "dataloader_num_workers", "seed", "oracle_temperature")
        check_at_least(self, 0, "adam_beta2")
        _check_below(self, 1, "adam_beta2")
        # keep two checkpoints, because a crash may leave the newest one incomplete
        check_at_least(self, 2, "keep_last")
        _check_choice(self, "precision", PRECISIONS)
        _check_choice(self, "lr_scheduler", LR_SCHEDULERS)
        _check_choice(self, "gradient_checkpointing", CHECKPOINTING_GRAINS)
        _check_choice(self, "oracle", ORACLES)
        self.eval_every = self.eval_every or max(25, self.max_steps // 10)
        if self.warmup_steps is None:
            self.warmup_steps = self.max_steps // 10
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps}: must be at most --max_steps {self.max_steps}")
        check_at_least(self, 1, "curriculum_steps")
        if self.curriculum is None and (self.curriculum_steps or self.curriculum_loss is not None):
            raise ValueError("--curriculum_steps and --curriculum_loss need --curriculum")
        # raises ValueError if the stages cannot be parsed
        self.build_curriculum()

    def build_curriculum(self) -> Curriculum | None:
        """Return the curriculum, or None without `--curriculum`. Raise ValueError if its stages do not grow."""
        if self.curriculum is None:
            return None
        stages = parse_stages(self.curriculum)
        return Curriculum(stages, self.curriculum_steps or max(1, self.max_steps // len(stages)), self.seed)


@dataclass
class TrackingArguments:
    """Flags of wandb and TensorBoard."""

    _argument_group_name: ClassVar[str] = "tracking"

    wandb_mode: str = flag(
        "auto",
        "online, offline, disabled or auto; auto: the mode in WANDB_MODE, else online if there is an API key, else "
        "offline",
    )
    wandb_entity: str | None = flag(
        None, "wandb user or team; if not given: WANDB_ENTITY, else the owner of the API key"
    )
    wandb_project: str | None = flag(None, "wandb project; if not given: WANDB_PROJECT, else recurrent-bart")
    wandb_group: str | None = flag(
        None,
        "wandb group, under which runs are shown together; if not given: WANDB_RUN_GROUP, else the name of the run "
        "folder",
    )
    wandb_tags: str = flag("", "wandb tags, separated by commas; if not given: WANDB_TAGS")
    tensorboard: bool = flag(False, "write metrics for TensorBoard to RUN/tensorboard; needs the package tensorboardX")

    def __post_init__(self) -> None:
        _check_choice(self, "wandb_mode", ("auto", *WANDB_MODES))

    def tags(self) -> list[str]:
        """Return the list of tags in `wandb_tags`."""
        return split_tags(self.wandb_tags)


def split_tags(text: str) -> list[str]:
    """Split a comma-separated text into a list of tags."""
    return [tag.strip() for tag in text.split(",") if tag.strip()]


@dataclass
class Arguments:
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    tracking: TrackingArguments


def build_parser() -> DataclassFlagParser:
    """Return the parser of all flags."""
    kinds = [ModelArguments, DataArguments, RunArguments, TrackingArguments]
    return DataclassFlagParser(kinds, description="Train Recurrent BART.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. With `--resume RUN`, flags that are not given keep that run's values.

    Raises:
        ValueError: A flag is unknown or out of range, there is no run to resume, or a resumed run cannot change a given
            flag.
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
                f"--output_dir {arguments.run.output_dir}: a resumed run keeps its folder; remove the flag"
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
    """Return the saved flags of a run, without removed flags and without permissions to trust files."""
    saved = RunFolder(Path(folder)).read_config().get("arguments", {})
    resumed_names = set(known) - {"trust_checkpoint", "trust_remote_code"}
    saved = {group: data_flags(values) if group == "data" else values for group, values in saved.items()}
    flags = {name: value for group in saved.values() for name, value in group.items() if name in resumed_names}
    if "max_steps" in given and flags.get("warmup_steps") is not None:
        # the saved value was derived from the earlier, larger --max_steps
        flags["warmup_steps"] = min(flags["warmup_steps"], given["max_steps"])
    dropped = ["length_penalty", "early_stopping"] if given.get("num_beams") == 1 else []
    dropped += ["temperature", "top_p"] if given.get("do_sample") is False else []
    flags = {name: value for name, value in flags.items() if name not in dropped}
    return flags | {"resume": folder, "output_dir": folder}


def _make_paths_absolute(arguments: Arguments) -> None:
    """Make existing paths absolute. Names on the Hugging Face Hub and missing paths stay as they are."""
    for group, names in (
        (arguments.model, ("model_name_or_path", "tokenizer_name")),
        (arguments.data, ("dataset", "train_file", "validation_file", "test_file", "cache_dir")),
        (arguments.run, ("deepspeed",)),
    ):
        for name in names:
            value = getattr(group, name)
            # the cache folder may not exist yet
            if value not in (None, EMBEDDED) and (name == "cache_dir" or Path(value).expanduser().exists()):
                setattr(group, name, str(Path(value).expanduser().absolute()))


def data_flags(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the data flags of a run. Runs older than `--held_out_by` chose validation documents by line number."""
    return {"held_out_by": "line"} | saved
