"""The DeepSpeed engine around a model, and the whole model out of it again."""

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
from recurrent_bart.training.zero.deepspeed_patches import apply_patches, sum_in, without_bf16_optimizer
from recurrent_bart.training.zero.gradient_sums import StepGradients


def build_engine(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, config: dict[str, Any]
) -> DeepSpeedEngine:
    """Shard a model and its optimizer.

    ZeRO-3 gathers parameters at each call of a module. The recurrence calls every layer once per segment, so the
    encoder is made a leaf: it is gathered once per forward pass, as a whole. Ranks may then read different numbers of
    segments in one step. The decoder is a leaf too: hooks on each of its parts take more CPU time than the parts take
    GPU time, and a whole decoder can be replayed as a CUDA graph.

    Raises:
        ValueError: The installed DeepSpeed lacks a name without which numbers would be wrong.
    """
    if config["zero_optimization"]["stage"] == 3:
        set_z3_leaf_modules(model, [RecurrentBartEncoder, RecurrentBartDecoder])
        for owner in [module for module in model.modules() if isinstance(module, RecurrentBartModel)]:
            for part in ("encoder", "decoder"):
                _take_embedding_out(owner, part)
    # the engine writes into its configuration, so it gets a copy
    sharding = without_bf16_optimizer(config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=sharding)
    sum_in(engine.optimizer, config)
    apply_patches(engine)
    engine.train()
    return engine


def _take_embedding_out(model: RecurrentBartModel, name: str) -> None:
    """Make a leaf's token embedding a child of the model, and a plain attribute of the leaf.

    It makes the leaf's input, so it is gathered for itself, and gets its gradient when the leaf's backward pass is done
    and the leaf's gradients are reduced: that of a part of the leaf would be lost in silence.
    """
    leaf = model.get_submodule(name)
    embedding = leaf.get_submodule("embed_tokens")
    # a place without a module, for weights that are loaded have that name
    leaf.embed_tokens = None
    object.__setattr__(leaf, "embed_tokens", embedding)
    # which add_module would refuse for its dot
    model._modules[f"{name}.embed_tokens"] = embedding


@contextlib.contextmanager
def reducing_once(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within this block, sum the gradients of all backward passes; reduce the sums over ranks once, at its end.

    The sums are in `grad_accum_dtype` of the sharding configuration. Nothing is reduced if a pass fails: the other
    ranks are elsewhere then, and this one would wait for them instead of ending with its error.

    Raises:
        RuntimeError: DeepSpeed did not reduce the gradients where this package expects it to.
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
    """The model in evaluation mode and whole on every process, so that each may call it as often as it likes.

    Under ZeRO-3 every call of a module is a collective: processes would have to generate texts of the same length, and
    each token would cost a gathering of every layer. It takes the memory of the whole model in the precision that is
    computed in.
    """
    module = engine.module
    engine.eval()
    if engine.zero_optimization_stage() < 3:
        yield module
    else:
        offload = engine.optimizer.parameter_offload
        with GatheredParameters(list(module.parameters())):
            # else they would give the parts back after each call
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
    """A backward pass through a leaf, as the figures of the recurrence need one, is none of training's meanwhile."""
    hooks = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in engine.optimizer.leaf_parameters]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, kept in hooks:
            registered.update(kept)


@torch.no_grad()
def full_state_dict(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """All weights in float32 on the first process; empty on the others, which must call it too."""
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = _full_parameter(parameter)
        if is_first():
            state[name] = whole.detach().float().cpu().clone()
    if is_first():
        state |= {name: buffer.detach().float().cpu() for name, buffer in engine.module.named_buffers()}
        # the further names of shared weights, which named_parameters gives once
        state |= {name: state[source] for name, source in engine.module.all_tied_weights_keys.items()}
    return state


def save_model(engine: DeepSpeedEngine, weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights of `full_state_dict` for `from_pretrained`, which reads them in the precision they have."""
    engine.module.save_pretrained(folder, state_dict=weights)
    # what was just written names the precision that the engine computes in
    config = copy.deepcopy(engine.module.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)


def _full_parameter(parameter: nn.Parameter) -> Tensor:
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with GatheredParameters([parameter]):
        return parameter.detach().clone()
