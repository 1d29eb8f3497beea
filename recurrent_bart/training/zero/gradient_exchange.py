"""Data type in which gradients are accumulated and exchanged over ranks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def without_bf16_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with which ZeRO-1 in bfloat16 reduces gradients as ZeRO-2 does.

    If ZeRO-1 sums gradients in float32, DeepSpeed uses another optimizer wrapper. That wrapper cannot reduce the
    gradients of several passes together and computes no norm per gradient. `sum_in` sets the data type afterwards.
    """
    if config["zero_optimization"]["stage"] != 1 or not config.get("bf16", {}).get("enabled"):
        return dict(config)
    return config | {"data_types": config.get("data_types", {}) | {"grad_accum_dtype": "bf16"}}


def sum_in(optimizer: Any, config: dict[str, Any]) -> None:
    """Make ZeRO-1 accumulate its gradient partition in the data type that the configuration names."""
    if config["zero_optimization"]["stage"] == 1 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        optimizer.gradient_accumulation_dtype = torch.float32


@contextlib.contextmanager
def exchanging_gradients_in(optimizer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Make a ZeRO optimizer accept and exchange gradients in a data type, within this block.

    ZeRO-1 and ZeRO-2 read gradients from `parameter.grad_accum`, ZeRO-3 from `parameter.grad`.
    """
    settings = {
        "communication_data_type": dtype,
        "ipg_buckets": {dtype: type(next(iter(optimizer.ipg_buckets.values())))()},
    }
    if _reads_grad_accum(optimizer):
        settings["use_grad_accum_attribute"] = True
    else:
        # ZeRO-3 would copy gradients into a contiguous buffer and out again, without need
        settings["contiguous_gradients"] = False
    before = {name: getattr(optimizer, name) for name in settings}
    vars(optimizer).update(settings)
    try:
        yield
    finally:
        vars(optimizer).update(before)


def give_gradient(optimizer: Any, parameter: Any, gradient: Tensor) -> None:
    """Pass an unsharded gradient of any data type to a ZeRO optimizer, within `exchanging_gradients_in`."""
    if _reads_grad_accum(optimizer):
        parameter.grad_accum = gradient
    else:
        # PyTorch checks a gradient's shape and type against the parameter, whose data is partitioned or in another
        # type; setting `.data` skips this check
        parameter.grad = torch.empty_like(parameter)
        parameter.grad.data = gradient


def _reads_grad_accum(optimizer: Any) -> bool:
    return hasattr(optimizer, "use_grad_accum_attribute")


def has_offload(optimizer: Any) -> bool:
    """Return True if the optimizer keeps its gradients in CPU memory."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
