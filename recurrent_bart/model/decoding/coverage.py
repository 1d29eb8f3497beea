"""Reasons why a call of `generate` needs Hugging Face's own loop."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartLearnedPositionalEmbedding

from recurrent_bart.execution.module_settings import has_hooks, own_parameters
from recurrent_bart.model.decoder_attention import CrossAttention, GatedCrossAttention, SelfAttention
from recurrent_bart.model.decoding.stopping import StopWhen
from recurrent_bart.model.modeling_decoder import PreNormDecoderLayer, RecurrentBartDecoder
from recurrent_bart.model.modeling_outputs import RecurrentEncoderOutput
from recurrent_bart.recurrence.segmentation import is_traced

# what Hugging Face's `generate` adds, and what the fast loop does not read because the contexts are known
READ_KWARGS = {"encoder_outputs", "use_cache", "past_key_values", "attention_mask", "synced_gpus", "streamer"}
# settings whose results or caches only Hugging Face's loop has
UNREAD_SETTINGS = (
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    *("cache_implementation", "prefill_chunk_size", "is_assistant", "low_memory", "compile_config"),
)
# module of the hooks that count and time an engine's steps; they change no output without DeepSpeed's own casts
ENGINE = "deepspeed.runtime.engine"
LAYERS = (BartDecoderLayer, PreNormDecoderLayer)
ATTENTIONS = (CrossAttention, GatedCrossAttention)


def call_needs_hugging_face(config: GenerationConfig, stopping_criteria: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the first argument of a call that the fast loop does not cover, or None."""
    settings = [name for name in UNREAD_SETTINGS if getattr(config, name, None)]
    given = [name for name, value in kwargs.items() if name not in READ_KWARGS and value is not None]
    other = [type(part).__name__ for part in stopping_criteria if not _is_covered(part, config)]
    if not config.use_cache:
        settings.append("use_cache=False")
    if kwargs.get("synced_gpus"):
        given.append("synced_gpus")
    if getattr(kwargs.get("past_key_values"), "_is_user_defined", False):
        given.append("past_key_values")
    encoded = kwargs.get("encoder_outputs")
    if not isinstance(encoded, RecurrentEncoderOutput) or encoded.packing is not None:
        given.append("encoder_outputs")
    return next(iter((*settings, *given, *other)), None)


def _is_covered(criterion: Any, config: GenerationConfig) -> bool:
    """Return True if a stopping criterion also ends the fast loop, which reads the settings itself."""
    if type(criterion) is StopWhen:
        return True
    if type(criterion) is MaxLengthCriteria:
        return criterion.max_length == config.max_length
    eos = getattr(config, "_eos_token_tensor", None)
    return (
        type(criterion) is EosTokenCriteria
        and eos is not None
        and torch.equal(criterion.eos_token_id.cpu().flatten(), eos.cpu().flatten())
    )


def model_needs_hugging_face(model: Any, device: torch.device) -> str | None:
    """Return why the fast loop does not cover a model, or None."""
    return next(_reasons(model, device), None)


def _reasons(model: Any, device: torch.device) -> Iterator[str]:
    decoder = model.model.decoder
    # a walk over all modules takes a tenth of a millisecond, so there is only one
    parts = list(decoder.modules())
    head_parts = list(model.lm_head.modules())
    if is_traced():
        yield "a compiler traces the model"
    if model.training or any(part.training for part in parts):
        yield "the model is in training mode"
    if torch.is_autocast_enabled(device.type):
        yield "autocast is on"
    replaced = {"forward", "prepare_inputs_for_generation"} & {*vars(model), *vars(model.model), *vars(decoder)}
    if replaced or any("forward" in vars(part) for part in (*parts, model.lm_head)):
        yield "a method of the model is replaced, for example by an offloading hook or by PEFT's prompts"
    if not _has_own_methods(model):
        yield "the model's class replaces a method"
    whole = model.model, *parts, *head_parts
    if _has_foreign_hooks(model) or _has_global_hooks() or any(has_hooks(part) for part in whole):
        yield "the model, its decoder or its head has hooks, for example of DeepSpeed ZeRO-3 or of an offloaded model"
    if not _has_known_layers(decoder):
        yield "the decoder has modules of other types"
    yield from _weight_reasons(list(own_parameters([*parts, *head_parts])), device)


def _has_foreign_hooks(model: nn.Module) -> bool:
    """Return True if a call of the model also calls a hook that is not an engine's."""
    hooks = *model._forward_pre_hooks.values(), *model._forward_hooks.values()
    return any(getattr(hook, "__module__", None) != ENGINE for hook in hooks)


def _has_global_hooks() -> bool:
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _has_own_methods(model: Any) -> bool:
    """Return True if a subclass replaces no method that Hugging Face's loop would call."""
    # import late: these modules import each other
    from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration, RecurrentBartModel

    of_model, of_inner = type(model), type(model.model)
    return (
        of_model.forward is RecurrentBartForConditionalGeneration.forward
        and of_model.prepare_inputs_for_generation
        is RecurrentBartForConditionalGeneration.prepare_inputs_for_generation
        and of_inner.forward is RecurrentBartModel.forward
        and of_inner.decode is RecurrentBartModel.decode
    )


def _has_known_layers(decoder: Any) -> bool:
    return (
        type(decoder) is RecurrentBartDecoder
        and type(decoder.embed_positions) is BartLearnedPositionalEmbedding
        and all(
            type(layer) in LAYERS and type(layer.self_attn) is SelfAttention and type(layer.encoder_attn) in ATTENTIONS
            for layer in decoder.layers
        )
    )


def _weight_reasons(weights: list[nn.Parameter], device: torch.device) -> Iterator[str]:
    if device.type not in ("cpu", "cuda") or any(part.device != device for part in weights):
        yield "the decoder's weights are not on one CPU or GPU, where the contexts are"
    if any(_is_partitioned(part) for part in weights):
        yield "DeepSpeed ZeRO-3 has partitioned the weights"


def _is_partitioned(weight: Tensor) -> bool:
    return weight.numel() != getattr(weight, "ds_numel", weight.numel())
