"""Constants that a module's result depends on, besides inputs, parameters and random numbers.

Python code reads the constants at each call. A CUDA graph keeps the constants of its capture. The wavefront schedule
computes several layers at once, so these layers must have equal constants.
"""

import contextlib
import functools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# attributes that hold every module's tensors, submodules and hooks
BOOKKEEPING = frozenset({*vars(nn.Module()), "graph_store"}) - {"training"}
# attributes that ZeRO-3 adds to modules, beside names with the prefix. They say where parameters are, and the methods
# among them are new functions for each module
SHARDING = frozenset(
    {"all_parameters", "_external_params", "_original_parameters", "_z3_leaf", "pre_bwd_fn", "post_bwd_fn"}
)
SHARDING_PREFIX = "ds_"
# types whose values serve as keys directly
PLAIN = frozenset({bool, float, str, type(None)})


def settings_of(*modules: nn.Module) -> list[tuple]:
    """Return for each module a hashable key of the constants of the module and all its submodules.

    Constants are types, flags, rates, names (for example, the active adapter's name), functions, configuration fields
    and buffer addresses. Integers are left out: parameter shapes determine sizes, and libraries count calls in
    integer attributes.
    """
    # many submodules have the same configuration object as an attribute
    configs: dict[int, Hashable] = {}
    return [tuple(constant for _, constant in _named_settings(module, configs)) for module in modules]


def different_settings(module: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the attributes in which two modules differ."""
    one, another = (set(_named_settings(part, {})) for part in (module, other))
    return sorted({name.lstrip(".") for name, _ in one ^ another})


@contextlib.contextmanager
def changed_fields(config: PreTrainedConfig, **changes: Any) -> Iterator[None]:
    """Change fields of a configuration, and restore their values at the end."""
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _named_settings(module: nn.Module, configs: dict[int, Hashable]) -> Iterator[tuple[str, Any]]:
    for prefix, part in module.named_modules():
        yield prefix, type(part)
        for attributes in (vars(part), part._buffers):
            for name, value in attributes.items():
                if _is_setting(name) and type(value) is not int:
                    yield f"{prefix}.{name}", value if type(value) in PLAIN else _constant(configs, value)


def _is_setting(name: str) -> bool:
    return name not in BOOKKEEPING and name not in SHARDING and not name.startswith(SHARDING_PREFIX)


def backend_settings() -> tuple:
    """Return PyTorch's global flags that choose kernels or their precision."""
    cuda = torch.backends.cuda
    return (
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters that each module itself holds; several times faster than `Module.parameters`."""
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of the module also calls a hook."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _constant(configs: dict[int, Hashable], value: Any) -> Hashable:
    """Return a key that is equal for values with equal effect on a computation, or None if a value has no effect.

    `configs` caches the keys of configurations by `id`; this function adds missing keys.
    """
    constant = functools.partial(_constant, configs)
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(map(constant, value))
    if isinstance(value, dict):
        return tuple((str(name), constant(part)) for name, part in value.items())
    if isinstance(value, functools.partial):
        return constant(value.func), constant(value.args), constant(value.keywords)
    # parameters are left out: ZeRO-3 gathers them at other addresses each time
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.data_ptr(), value.shape, value.dtype
    if isinstance(value, PreTrainedConfig):
        if id(value) not in configs:
            configs[id(value)] = constant(vars(value)), ALL_ATTENTION_FUNCTIONS.get(value._attn_implementation)
        return configs[id(value)]
    # Python makes a new object for each access of a bound method
    function = getattr(value, "__func__", value)
    return function if callable(function) and not isinstance(function, type | nn.Module) else None
