"""Construction of the DeepSpeed engine, and export of the gathered model."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recurrent_bart.distributed import is_first
from recurrent_bart.model.modeling_decoder import RecurrentBartDecoder
from recurrent_bart.model.modeling_encoder import RecurrentBartEncoder
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartModel
from recurrent_bart.training.zero.deepspeed_patches import apply_patches
from recurrent_bart.training.zero.gradient_exchange import sum_in, without_bf16_optimizer
from recurrent_bart.training.zero.gradient_sums import StepGradients


def build_engine(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, config: dict[str, Any]
) -> DeepSpeedEngine:
    """Shard a model and its optimizer. Raise ValueError if DeepSpeed lacks a name that is needed for correct numbers.

    ZeRO-3 gathers parameters at each call of a module, and the recurrence calls every layer once per segment. To gather
    less often, the whole encoder is a leaf: a module that ZeRO-3 gathers once per forward pass. Ranks may then read
    different numbers of segments in one step. The decoder is a leaf too: hooks on its submodules take more CPU time
    than the submodules take GPU time. A whole decoder can also be replayed as a CUDA graph.
    """
    if config["zero_optimization"]["stage"] == 3:
        set_z3_leaf_modules(model, [RecurrentBartEncoder, RecurrentBartDecoder])
        for owner in [module for module in model.modules() if isinstance(module, RecurrentBartModel)]:
            for part in ("encoder", "decoder"):
                _take_embedding_out(owner, part)
    # the engine changes its configuration, so it gets a copy
    sharding = without_bf16_optimizer(config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=sharding)
    sum_in(engine.optimizer, config)
    apply_patches(engine)
    engine.train()
    return engine


def _take_embedding_out(model: RecurrentBartModel, name: str) -> None:
    """Move the token embedding out of a leaf (a module that ZeRO-3 gathers as a whole), into the model.

    The embedding computes the leaf's input, so its gradient arrives after the leaf's backward pass. DeepSpeed has then
    already reduced the leaf's gradients, and the embedding's gradient would be silently lost.
    """
    leaf = model.get_submodule(name)
    embedding = leaf.get_submodule("embed_tokens")
    # keep the name without a module, because loaded weights have this name
    leaf.embed_tokens = None
    object.__setattr__(leaf, "embed_tokens", embedding)
    # `add_module` refuses a name that contains a dot
    model._modules[f"{name}.embed_tokens"] = embedding


@contextlib.contextmanager
def reducing_once(engine: DeepSpeedEngine) -> Iterator[None]:
    """Sum the gradients of all backward passes in this block. Reduce the sums over ranks once, at the end.

    The sums have the data type `grad_accum_dtype` of the configuration. If a pass fails, nothing is reduced: this rank
    would wait forever for ranks that do not reduce.

    Raises:
        RuntimeError: DeepSpeed did not reduce the gradients in the function that this package replaces.
    """
    gradients = StepGradients(engine)
    with gradients.collected(), engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            gradients.drop()
            raise
    if not gradients.is_reduced:
        raise RuntimeError(f"DeepSpeed {deepspeed.__version__} has not reduced the gradients of a step")


@contextlib.contextmanager
def gathered_for_evaluation(engine: DeepSpeedEngine) -> Iterator[Any]:
    """Gather the whole model on every rank, in evaluation mode. Each rank may call the model any number of times.

    In a sharded ZeRO-3 model, every call of a module is a collective. Ranks would have to generate texts of the same
    length, and each token would gather every layer. Gathering needs memory for the whole model, in the precision of the
    computation.
    """
    module = engine.module
    engine.eval()
    if engine.zero_optimization_stage() < 3:
        yield module
    else:
        offload = engine.optimizer.parameter_offload
        with GatheredParameters(list(module.parameters())):
            # the hooks would partition the parameters again after each call
            offload._remove_module_hooks()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                with _unreduced(engine):
                    yield module
            finally:
                offload.setup_zero_stage3_hooks()
    engine.train()


@contextlib.contextmanager
def _unreduced(engine: DeepSpeedEngine) -> Iterator[None]:
    """Disable the hooks that collect parameter gradients under ZeRO-3, for backward passes that compute metrics."""
    hooks = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in engine.optimizer.leaf_parameters]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, saved in hooks:
            registered.update(saved)


@torch.no_grad()
def full_state_dict(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return all weights in float32 on rank 0, and an empty dictionary on other ranks. All ranks must call it."""
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = _full_parameter(parameter)
        if is_first():
            state[name] = whole.detach().float().cpu().clone()
    if is_first():
        state |= {name: buffer.detach().float().cpu() for name, buffer in engine.module.named_buffers()}
        # named_parameters yields a tied weight under one name only; add its other names
        state |= {name: state[source] for name, source in engine.module.all_tied_weights_keys.items()}
    return state


def save_model(engine: DeepSpeedEngine, weights: dict[str, Tensor], folder: Path) -> None:
    """Save weights from `full_state_dict` for `from_pretrained`, which then loads them in float32."""
    engine.module.save_pretrained(folder, state_dict=weights)
    # save_pretrained has stored the engine's precision in config.json; overwrite it
    config = copy.deepcopy(engine.module.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)


def _full_parameter(parameter: nn.Parameter) -> Tensor:
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with GatheredParameters([parameter]):
        return parameter.detach().clone()
