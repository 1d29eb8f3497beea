"""Flags of the model."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.training.argument_fields import check_at_least, check_below, check_choice, check_given, flag

TRAINED = ("all", "prefix")


@dataclass
class ModelArguments:
    """Flags of the model. Without a flag, the pretrained model's value or RecurrentBartConfig's default holds."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = flag(
        None,
        "path or Hugging Face Hub name of a pretrained BART, MBart or Recurrent BART; if not given: a new model of "
        "size --model_size",
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
        check_given(self)
        check_at_least(self, 0, "dropout")
        check_below(self, 1, "dropout")
        check_choice(self, "train", TRAINED)
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
