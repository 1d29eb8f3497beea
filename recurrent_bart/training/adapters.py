"""Choice of trained parameters: all, only the recurrence, or the recurrence and low-rank adapters."""

import importlib.util

import torch
from torch import Tensor, nn

from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.optimization import is_adapter

# the projections that the LoRA paper adapts, arXiv 2106.09685
ADAPTED = ("q_proj", "v_proj")
ADAPTER = "default"


def choose_trained(model: nn.Module, arguments: ModelArguments) -> None:
    """Freeze parameters according to `--train` and `--lora_r`, and inject adapters.

    The adapters are injected in place, so the model keeps its class, parameter names and methods.

    Raises:
        ValueError: Adapters are requested and peft is not installed.
    """
    if arguments.lora_r:
        _inject(model, arguments)
    if arguments.lora_r or arguments.train == "prefix":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_recurrence(name) or is_adapter(name))


def merged(weights: dict[str, Tensor], arguments: ModelArguments) -> dict[str, Tensor]:
    """Return weights without adapters: each adapted weight W becomes `W + alpha / r * B A`."""
    scale = arguments.lora_strength() / max(1, arguments.lora_r)
    plain = {name: weight for name, weight in weights.items() if ".base_layer." not in name and not is_adapter(name)}
    for name in weights:
        if ".base_layer." not in name:
            continue
        module, kind = name.split(".base_layer.")
        weight = weights[name]
        if kind == "weight":
            low, high = (weights[f"{module}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            weight = weight + scale * torch.matmul(high, low)
        plain[f"{module}.{kind}"] = weight
    return plain


def _inject(model: nn.Module, arguments: ModelArguments) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora_r needs the package peft: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_strength(), target_modules=list(ADAPTED))
    # without this wrapper, PEFT would train a copy of the recurrence and not the original
    inject_adapter_in_model(config, nn.ModuleDict({"adapted": model}), adapter_name=ADAPTER)
