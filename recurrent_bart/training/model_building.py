"""Building of the model that a run trains: pretrained, or from scratch in a named size."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.rows import TASKS
from recurrent_bart.data.tokenizer import has_languages, special_tokens_around_targets
from recurrent_bart.model.loading import load_pretrained
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.model.saved_models import reading_model
from recurrent_bart.monitoring.progress import say
from recurrent_bart.training.model_arguments import ModelArguments


def _size(d_model: int, n_layers: int, n_heads: int) -> dict[str, int]:
    shared = {"layers": n_layers, "attention_heads": n_heads, "ffn_dim": 4 * d_model}
    prefixed = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()}
    return {"d_model": d_model, **prefixed}


# base and large have the dimensions of facebook/bart-base and facebook/bart-large; tiny is for a CPU. Narrow layers of
# tiny and small would hardly learn in a few steps with BART's init_std of 0.02
SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(d_model=128, n_layers=2, n_heads=4) | {"segment_size": 256, "init_std": 0.06},
    "small": _size(d_model=256, n_layers=4, n_heads=4) | {"init_std": 0.06},
    "base": _size(d_model=768, n_layers=6, n_heads=12),
    "large": _size(d_model=1024, n_layers=12, n_heads=16),
}

# config fields of a model that is not yet Recurrent BART, by task. ROUGE is higher if the decoder sees all segments of
# its document, or of its section, and if the gradient reaches all of them (RESULTS.md)
IF_NEW: dict[str, dict[str, Any]] = {
    "document": {"decoder_context": "all", "bptt_depth": -1},
    "sections": {"decoder_context": "section"},
    "denoise": {"decoder_context": "all", "bptt_depth": -1},
    "recall": {"decoder_context": "last", "bptt_depth": -1},
}


def build_config(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, task: str = TASKS[0]
) -> RecurrentBartConfig:
    """Build a new model's configuration, or change the given fields of a pretrained model's configuration.

    A new model and a plain BART get the fields of `IF_NEW`. If `--decoder_context` differs from the value in `IF_NEW`,
    the model gets none of these fields.

    Raises:
        ValueError: A size is unknown, a field is out of range, LayerDrop is used, the vocabulary is smaller than the
            tokenizer's, or the model cannot recall as the task does.
    """
    given, new = arguments.config_fields(), IF_NEW[task]
    if task == "recall":
        # also of a trained model: with the tokens of earlier segments, the decoder would copy the target
        given = {"decoder_context": new["decoder_context"]} | given
    if given.get("decoder_context", new["decoder_context"]) != new["decoder_context"]:
        new = {}
    config = _combined(arguments, tokenizer, new, given)
    if task == "recall":
        _check_recall(config)
    return config


def _check_recall(config: RecurrentBartConfig) -> None:
    """Raise ValueError if the model has no state, or if the decoder sees the tokens that it should recall."""
    if config.decoder_context not in ("last", "memory"):
        raise ValueError(
            f"--decoder_context {config.decoder_context}: with --task recall the decoder must not see the tokens of "
            "earlier segments; give last or memory"
        )
    if not config.has_state:
        raise ValueError("--task recall: the model has no state to recall from; give --recurrence and --pre_seq_len")


def _combined(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, new: dict[str, Any], given: dict[str, Any]
) -> RecurrentBartConfig:
    """Return the configuration of a new or saved model with the given fields. `new` are fields of a new model."""
    try:
        if arguments.model_name_or_path is None:
            return RecurrentBartConfig(**_from_scratch(arguments, tokenizer) | new | given)
        saved, _ = RecurrentBartConfig.get_config_dict(arguments.model_name_or_path)
        # the saved configuration of a plain BART has no `model_type` here
        config = RecurrentBartConfig.from_dict(saved, **given if "model_type" in saved else new | given)
    except (OSError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--model_name_or_path {arguments.model_name_or_path}: {text}") from error
    if config.decoder_layerdrop:
        # with LayerDrop under ZeRO-3, ranks that drop different layers would deadlock, and gradients of earlier steps
        # would be used
        raise ValueError(
            f"--model_name_or_path {arguments.model_name_or_path}: decoder_layerdrop is {config.decoder_layerdrop} in "
            "config.json; training needs the value 0"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, but {arguments.model_name_or_path} has only {config.vocab_size}"
        )
    _check_special_ids(arguments, config, tokenizer)
    if config.wraps_last_label:
        # generation begins as the decoder's inputs in training do
        config.decoder_start_token_id = _last_label(arguments, tokenizer)
    return config


def _last_label(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> int:
    _, trailing = special_tokens_around_targets(tokenizer)
    if not trailing:
        raise ValueError(
            f"the tokenizer adds no token after a target, but {arguments.model_name_or_path} begins each text with the "
            "target's last token, as MBart does; use a tokenizer that adds an end token or a language code"
        )
    return trailing[-1]


def _check_special_ids(
    arguments: ModelArguments, config: RecurrentBartConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a pretrained model and the tokenizer have the same special ids.

    If they differ, the model never sees the end of a text, or takes text for padding.
    """
    names = ("bos_token_id", "pad_token_id", "eos_token_id")
    differing = [
        f"{name} {getattr(tokenizer, name)}, not {getattr(config, name)}"
        for name in names
        if getattr(tokenizer, name) != getattr(config, name)
    ]
    if differing:
        whose = f"--tokenizer_name {arguments.tokenizer_name}" if arguments.tokenizer_name else "the tokenizer"
        raise ValueError(
            f"{whose} and {arguments.model_name_or_path} have different special ids: {'; '.join(differing)}. Give the "
            "tokenizer that the model was trained with, or correct the ids in the model's config.json"
        )


def build_model(
    arguments: ModelArguments, config: RecurrentBartConfig, seed: int
) -> RecurrentBartForConditionalGeneration:
    """Build the model in float32, in training mode, with the same weights on every rank.

    `from_pretrained` returns a model in evaluation mode, without dropout, and DeepSpeed does not change the mode.

    Raises:
        ValueError: The weights cannot be read.
    """
    torch.manual_seed(seed)
    if arguments.model_name_or_path is None:
        model = RecurrentBartForConditionalGeneration(config)
    else:
        with reading_model("--model_name_or_path", arguments.model_name_or_path):
            model = load_pretrained(
                RecurrentBartForConditionalGeneration,
                arguments.model_name_or_path,
                lambda text: say(f"new        {text}"),
                config=config,
                dtype=torch.float32,
            )
    if config.wraps_last_label:
        model.generation_config.decoder_start_token_id = config.decoder_start_token_id
    return model.train()


def force_target_language(model: RecurrentBartForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generated texts begin with the language code, if targets begin with one, as in MBart-50."""
    leading, _ = special_tokens_around_targets(tokenizer)
    if has_languages(tokenizer):
        model.generation_config.forced_bos_token_id = leading[0] if leading else None


def _from_scratch(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if arguments.model_size not in SIZES:
        raise ValueError(f"--model_size {arguments.model_size}: allowed are {', '.join(SIZES)}")
    return SIZES[arguments.model_size] | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
