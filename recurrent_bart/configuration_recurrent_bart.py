"""Configuration of Recurrent BART: the fields of BART, of MBart's layout and of the recurrence."""

from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BartConfig, MBartConfig

# module that is saved beside a configuration, and its classes by the Auto classes that load them
PACKAGE_MODULE = Path(__file__).parent / "model" / "installed_package.py"
AUTO_MAP = {
    "AutoConfig": f"{PACKAGE_MODULE.stem}.RecurrentBartConfig",
    "AutoModel": f"{PACKAGE_MODULE.stem}.RecurrentBartModel",
    "AutoModelForSeq2SeqLM": f"{PACKAGE_MODULE.stem}.RecurrentBartForConditionalGeneration",
}
# allowed values; the first one is the default
RECURRENCES = ("layerwise", "top", "none")
PREFIX_ATTENTIONS = ("concat", "gated")
DECODER_CONTEXTS = ("last", "memory", "section", "all")
SCHEDULES = ("auto", "sequential", "wavefront")
# fields of old configurations. transformers ignores these fields, because its BART and MBart have only these layouts
EMBEDDING_LAYOUT = {"normalize_embedding": True, "static_position_embeddings": False}
LAYOUTS = {
    BartConfig.model_type: {"normalize_before": False, "add_final_layer_norm": False, **EMBEDDING_LAYOUT},
    # some checkpoints of MBart have other values of the first two fields; the weights of the final norms decide
    MBartConfig.model_type: EMBEDDING_LAYOUT,
}
# fields that turn the configuration of an MBart checkpoint into one of Recurrent BART
MBART_FIELDS = {"normalize_before": True, "wraps_last_label": True}
# reason why the checkpoints of a model family cannot be loaded
DIFFERENT_FAMILIES = {
    "pegasus": "its positions are sinusoidal and its embeddings have no norm",
    "plbart": "its layers are BART's, but its shift of labels is MBart's",
    "t5": "its attention has relative position biases and its norms have no mean and no bias",
    "mt5": "its attention has relative position biases and its norms have no mean and no bias",
    "led": "its encoder attends to windows of tokens",
    "m2m_100": "its positions are sinusoidal and its embeddings have no norm",
    "marian": "its positions are sinusoidal and its embeddings have no norm",
    "blenderbot": "its embeddings have no norm",
}


@strict
class RecurrentBartConfig(BartConfig):
    """Architecture of a BART or MBart that reads a document segment by segment.

    Every field of `BartConfig` keeps its meaning. `RecurrentBartForConditionalGeneration.from_pretrained` accepts the
    fields below as keyword arguments, for a checkpoint of Recurrent BART, plain BART or MBart.

    Args:
        normalize_before: Order of a layer's norms. False: BART's, a norm after each residual sum. True: MBart's, a norm
            before attention and before the feed-forward block, and a final norm after the last layer of encoder and
            decoder. A checkpoint of MBart sets this field.
        wraps_last_label: First input of the decoder in training. False: `decoder_start_token_id`. True: the last label
            of the row, which is the language code of MBart's targets. A checkpoint of MBart sets this field.
        pre_seq_len: Number P of prefix positions, which read the state, and of slots, which write the state. 0: no
            recurrence.
        segment_size: Number of tokens in a segment, with special tokens. None: 512, or the size of the position table
            if that is smaller.
        input_size: Token positions that the encoder sees per segment. The excess over `segment_size` is overlap: the
            last tokens of the previous segment, repeated in front. None: `segment_size`.
        max_n_segments: Number of segments read per document in training; later segments are dropped. -1: all.
        bptt_depth: Number of segment boundaries that the gradient of the state crosses. 0: none, -1: all. With one
            target per document, the decoder's gradient also reaches every segment that the decoder attends to. With
            targets per segment, it stays within the truncated-BPTT window of `bptt_depth + 1` segments.
        prefix_projection: True: a two-layer tanh MLP per layer projects the state to keys and values. False: the
            layer's `k_proj` and `v_proj` project the state.
        prefix_hidden_size: Hidden width of the MLP of `prefix_projection`.
        hidden_dropout_prob: Dropout on the projected prefix.
        recurrence: `"layerwise"`: every layer carries its own state. `"top"`: one state enters below the first layer
            and leaves above the last (RMT, arXiv 2207.06881); all layers read it as their prefix. `"none"`: no state,
            but a learned prefix, the same for every segment (P-tuning v2, arXiv 2110.07602).
        prefix_attention: `"concat"`: one softmax over prefix and tokens. `"gated"`: a separate softmax over the prefix,
            multiplied by a gate per head that starts at zero. A converted BART checkpoint then still gives BART's
            logits, but training learned to use the state late or never (studies/LOG.md).
        update_gate: True: a learned gate mixes the old and the new state. False: the new state replaces the old one.
        associative_memory: Each layer also carries a matrix per head. The delta rule writes the keys and values of
            tokens into the matrix; the tokens' queries read it through a gate per head (see `associative_memory.py`).
            Requires `recurrence="layerwise"`.
        matrix_gate_init: Initial argument of the tanh in the gate of `associative_memory`. 0: closed, so a converted
            BART checkpoint gives BART's logits. In training from scratch, a gate that started at 0 stayed closed, and
            a gate that started at 1 was used (studies/LOG.md).
        decoder_context: Positions that the decoder attends to. `"last"`: the final state and the tokens of the last
            segment. `"memory"`: the states after every segment and the last segment's tokens. `"all"`: the final state
            and the tokens of all segments (fusion-in-decoder, arXiv 2007.01282). `"section"`: the final state and the
            tokens of all segments since the previous target; equals `"all"` with one target per document.
        context_segments: Show the decoder states (`"memory"`) or tokens (`"section"`, `"all"`) of only the last N
            segments; -1 shows all.
        schedule: Order in which the cells (segment, layer) are computed; results are the same. `"sequential"`: segment
            after segment, layer after layer. `"wavefront"`: all independent cells at once; not with `recurrence="top"`.
            `"auto"`: wavefront where it is possible and faster (on a GPU, with several segments and few documents per
            batch), otherwise sequential. Without a state, "wavefront", and "auto" on a GPU, compute all segments as one
            batch without the padding segments. With gradient checkpointing, and without gradients, the batches are
            smaller.

    Raises:
        ValueError: A field is outside its range, or a segment does not fit the position table.
    """

    model_type = "recurrent_bart"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "state"]

    normalize_before: bool = False
    wraps_last_label: bool = False
    pre_seq_len: int = 20
    segment_size: int | None = None
    input_size: int | None = None
    max_n_segments: int = -1
    bptt_depth: int = 2
    prefix_projection: bool = True
    prefix_hidden_size: int = 512
    hidden_dropout_prob: float | int = 0.1
    recurrence: str = RECURRENCES[0]
    prefix_attention: str = PREFIX_ATTENTIONS[0]
    update_gate: bool = True
    associative_memory: bool = False
    matrix_gate_init: float | int = 0.0
    decoder_context: str = DECODER_CONTEXTS[0]
    context_segments: int = -1
    schedule: str = SCHEDULES[0]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.segment_size is None:
            self.segment_size = min(self.input_size or 512, self.max_position_embeddings)
        if self.input_size is None:
            self.input_size = self.segment_size
        self._check_choices()
        self._check_sizes()

    def _check_choices(self) -> None:
        choices = {
            "recurrence": RECURRENCES,
            "prefix_attention": PREFIX_ATTENTIONS,
            "decoder_context": DECODER_CONTEXTS,
            "schedule": SCHEDULES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")
        if self.schedule == "wavefront" and self.recurrence == "top":
            raise ValueError(
                'schedule="wavefront" does not work with recurrence="top": a segment needs the state after all layers '
                'of the previous segment. Use schedule="sequential" or recurrence="layerwise"'
            )

    def _check_sizes(self) -> None:
        lowest = {
            "pre_seq_len": 0,
            # one document token between the two special ones
            "segment_size": 3,
            "bptt_depth": -1,
            "prefix_hidden_size": 1,
        }
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for name in ("max_n_segments", "context_segments"):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1, or -1 for no cap")
        if not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"hidden_dropout_prob={self.hidden_dropout_prob}: must be at least 0 and below 1")
        if self.input_size < self.segment_size:
            raise ValueError(
                f"input_size={self.input_size}: must be at least segment_size={self.segment_size}, because input_size "
                "counts the tokens of the segment and of the overlap before the segment"
            )
        if self.input_size > self.max_position_embeddings:
            raise ValueError(
                f"segment_size={self.segment_size}, input_size={self.input_size}: must be at most "
                f"max_position_embeddings={self.max_position_embeddings}"
            )
        if self.decoder_context == "memory" and not self.has_state:
            raise ValueError(
                f'decoder_context="memory" needs a state, and pre_seq_len={self.pre_seq_len} with '
                f"recurrence={self.recurrence!r} gives no state"
            )
        if self.associative_memory and not (self.has_state and self.recurrence == "layerwise"):
            raise ValueError(
                f"associative_memory needs a state in each layer, and pre_seq_len={self.pre_seq_len} with "
                f"recurrence={self.recurrence!r} gives none"
            )
        if self.encoder_layerdrop:
            raise ValueError(
                f"encoder_layerdrop={self.encoder_layerdrop}: must be 0, because a dropped layer would lose its state. "
                "Load a checkpoint with another value by from_pretrained(..., encoder_layerdrop=0.0)"
            )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and a module that imports the classes of the installed package; see PreTrainedConfig.

        With the module, `from_pretrained(..., trust_remote_code=True)` works where nobody has imported the package.
        """
        self.auto_map = dict(AUTO_MAP)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PACKAGE_MODULE.name).write_bytes(PACKAGE_MODULE.read_bytes())
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: `save_pretrained` writes the module. A copy of this file would need the package too."""

    @property
    def has_state(self) -> bool:
        """True if a state is carried from segment to segment."""
        return self.pre_seq_len > 0 and self.recurrence != "none"

    @property
    def n_state_rows(self) -> int:
        """Number of rows of a layer's state: P, or P + K (K: head width) with `associative_memory`."""
        return self.pre_seq_len + self.associative_memory * (self.d_model // self.encoder_attention_heads)

    @property
    def bptt_window(self) -> int | None:
        """Number of segments in a truncated-BPTT window; None: one window holds all segments."""
        return None if self.bptt_depth == -1 else self.bptt_depth + 1

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read a configuration file of Recurrent BART, plain BART or MBart.

        Raises:
            ValueError: The file is of another model type, or the layers have another layout than the model type's.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        allowed = LAYOUTS | {cls.model_type: EMBEDDING_LAYOUT}
        if model_type not in allowed:
            reason = DIFFERENT_FAMILIES.get(model_type)
            raise ValueError(
                f"{pretrained_model_name_or_path}: model_type={model_type!r}; allowed are "
                f"{', '.join(map(repr, allowed))}{f'. A different family: {reason}' if reason else ''}"
            )
        for name, value in allowed[model_type].items():
            if config_dict.get(name, value) != value:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {name}={config_dict[name]!r} belongs to a different "
                    f"architecture; {model_type!r} has {value!r}"
                )
        if model_type == cls.model_type:
            return config_dict, kwargs
        config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "architectures")}
        if model_type == MBartConfig.model_type:
            # without a start token in the file, MBart has none and BART has 2
            config_dict = {"decoder_start_token_id": None, **config_dict, **MBART_FIELDS}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary; fields in `kwargs` replace its values before the checks run."""
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__dataclass_fields__}
        if "segment_size" in own and "input_size" not in own:
            # a new segment size with the file's input size would add an overlap that nobody asked for
            own["input_size"] = None
        return super().from_dict({**config_dict, **own}, **kwargs)
