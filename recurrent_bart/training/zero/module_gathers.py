"""Gathering of ZeRO-3 parameters by module: one collective and one copy for all parameters of the encoder.

DeepSpeed gathers a whole module in one collective too. But it then slices, joins, copies and releases each of
BART-large's 519 parameters separately, with several checks of each one (benchmarks/LOG.md).
"""

import itertools
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.comm
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

# gathered parameters begin at multiples of this number of elements, because kernels read aligned memory faster
ALIGNMENT = 128


def can_gather_by_module(engine: DeepSpeedEngine) -> bool:
    """Return True if `ModuleGathers` supports the engine's settings.

    Parameters must stay on the GPU, without quantization or a second partition. All parameters together must be within
    the limits up to which DeepSpeed keeps them between the forward and the backward pass.
    """
    optimizer, settings = engine.optimizer, engine._config.zero_config
    offload, parameters = optimizer.parameter_offload, list(engine.module.parameters())
    n_elements = sum(parameter.ds_numel for parameter in parameters)
    return (
        n_elements <= min(offload._max_reuse_distance_in_numel, offload._max_available_parameters_in_numel)
        and offload.offload_device is None
        and offload.zero_param_parallel_group is None
        and not (offload.zenflow or offload.fast_sharding_for_leaf_module)
        and not (offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights)
        and not (settings.allgather_sequential or settings.use_all_reduce_for_fetch_params)
        and not engine.torch_autocast_enabled()
        and len({(id(parameter.ds_process_group), parameter.ds_tensor.dtype) for parameter in parameters}) == 1
    )


class ModuleGathers:
    """Gathers and releases of an engine's parameters, with the methods of DeepSpeed's coordinator.

    After a forward pass, all gathered parameters stay gathered for the backward pass. The backward pass of a leaf
    module (a module that ZeRO-3 gathers as a whole) releases the module's parameters, and its end releases the rest.
    The GPU exchanges the parameters that the last forward pass gathered next while it computes, unless
    `stage3_prefetch_bucket_size` is 0.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self.module, self.device = engine.module, engine.device
        self.parameters = list(self.module.parameters())
        self.prefetches = engine.optimizer.parameter_offload._prefetch_bucket_sz > 0
        self.own: dict[nn.Module, list[Any]] = {}
        self.plans: dict[tuple[int, ...], Plan] = {}
        self.empty: dict[torch.dtype, Tensor] = {}
        # modules whose backward pass runs
        self.in_backward: dict[nn.Module, None] = {}
        # parameters of each gather of this forward pass and of the last one
        self.gathered: list[list[Any]] = []
        self.gathered_before: list[list[Any]] = []
        self.pending: Gather | None = None
        # hooks of a leaf module may run in several threads of autograd
        self.lock = threading.RLock()

    def replace_methods(self, coordinator: Any) -> None:
        """Replace the methods of DeepSpeed's coordinator, and record no order of modules."""
        coordinator.fetch_sub_module = self.fetch
        coordinator.release_sub_module = self.release
        coordinator.release_and_reset_all = lambda module: self.release_all()
        coordinator.release_backward_leftovers = self.release_after_backward
        coordinator.reset_step = self.begin_forward
        coordinator.trace_prologue = lambda module: None
        coordinator.is_record_trace = lambda: False

    def begin_forward(self) -> None:
        """Start a forward pass of the whole model."""
        self._finish_pending()
        self.gathered_before, self.gathered = self.gathered, []

    @torch.no_grad()
    def fetch(self, module: nn.Module, forward: bool) -> None:
        """Gather the missing parameters of a module, and mark them as used."""
        parameters = self._parameters_of(module)
        with self.lock:
            if not forward:
                self.in_backward[module] = None
            if any(it.ds_status is not ZeroParamStatus.AVAILABLE for it in parameters):
                self._gather(parameters, forward)
                assert all(it.ds_status is ZeroParamStatus.AVAILABLE for it in parameters)
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(module.ds_id)

    @torch.no_grad()
    def release(self, module: nn.Module, forward: bool = False) -> None:
        """Mark the parameters of a module as unused. Release them after the backward pass of a leaf module."""
        parameters = self._parameters_of(module)
        with self.lock:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(module.ds_id)
            if not forward:
                self.in_backward.pop(module, None)
                if z3_leaf_module(module):
                    self._free_unused(parameters)
            elif module is self.module:
                self._finish_pending()
                if not module.training:
                    # no backward pass is expected
                    self._free_unused(self.parameters)

    @torch.no_grad()
    def release_after_backward(self) -> None:
        """Release all parameters that no module uses, also of modules whose backward pass has not ended by a hook."""
        with self.lock:
            for module in self.in_backward:
                for parameter in self._parameters_of(module):
                    parameter.ds_active_sub_modules.discard(module.ds_id)
            self.in_backward.clear()
            self._finish_pending()
            self._free_unused(self.parameters)

    @torch.no_grad()
    def release_all(self) -> None:
        """Release all parameters before an update, also persistent ones."""
        with self.lock:
            self._finish_pending()
            self.in_backward.clear()
            for parameter in self.parameters:
                parameter.ds_active_sub_modules.clear()
            self._free(self.parameters)

    def _parameters_of(self, module: Any) -> list[Any]:
        if module not in self.own:
            self.own[module] = list(module.parameters(recurse=z3_leaf_module(module)))
        # DeepSpeed finds parameters that a module takes from other modules in the first forward pass
        external = [it for _, it in module.ds_external_parameters()]
        return [*self.own[module], *external] if external else self.own[module]

    def _gather(self, parameters: Sequence[Any], forward: bool) -> None:
        if self.pending is not None and not self.pending.holds(parameters):
            self._finish_pending()
        missing = self.pending.parameters if self.pending is not None else _missing(parameters)
        if not missing:
            return
        gather = self.pending or self._start(missing)
        self.pending = None
        gather.finish()
        if forward:
            self.gathered.append(missing)
            self._prefetch()

    def _prefetch(self) -> None:
        """Start the gather that followed in the last forward pass, if both passes have gathered the same until here."""
        number = len(self.gathered)
        if self.prefetches and number < len(self.gathered_before):
            following = self.gathered_before[number]
            if _keys(self.gathered[-1]) == _keys(self.gathered_before[number - 1]) and following == _missing(following):
                self.pending = self._start(following)

    def _start(self, parameters: list[Any]) -> "Gather":
        key = _keys(parameters)
        if key not in self.plans:
            self.plans[key] = Plan.of(parameters)
        return Gather(self.plans[key], parameters, self.device)

    def _finish_pending(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.finish()

    def _free_unused(self, parameters: Iterable[Any]) -> None:
        self._free(it for it in parameters if not (it.ds_active_sub_modules or it.ds_persist or it.is_external_param))

    def _free(self, parameters: Iterable[Any]) -> None:
        """Release parameters. Only the stream that computes has used their memory, so the GPU waits for nothing."""
        for parameter in parameters:
            if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                dtype = parameter.dtype
                if dtype not in self.empty:
                    self.empty[dtype] = torch.empty(0, dtype=dtype, device=self.device)
                parameter.data = self.empty[dtype]
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


@dataclass(frozen=True)
class Plan:
    """Memory layout of parameters of one data type that are gathered together.

    Attributes:
        lengths: Elements of each parameter's partition.
        starts: First element of each gathered parameter.
        strides: Strides of each gathered parameter.
        n_elements: Elements of all gathered parameters, with the space between them.
    """

    lengths: list[int]
    starts: list[int]
    strides: list[tuple[int, ...]]
    n_elements: int

    @classmethod
    def of(cls, parameters: Sequence[Any]) -> "Plan":
        """Build the layout of parameters."""
        n_processes = deepspeed.comm.get_world_size(parameters[0].ds_process_group)
        lengths = [parameter.ds_tensor.numel() for parameter in parameters]
        room = [-(-n_processes * length // ALIGNMENT) * ALIGNMENT for length in lengths]
        *starts, n_elements = itertools.accumulate(room, initial=0)
        strides = [
            tuple(math.prod(parameter.ds_shape[place + 1 :]) for place in range(len(parameter.ds_shape)))
            for parameter in parameters
        ]
        return cls(lengths, starts, strides, n_elements)


class Gather:
    """All-gather of parameters, which may run while the GPU computes."""

    def __init__(self, plan: Plan, parameters: list[Any], device: torch.device):
        self.plan, self.parameters = plan, parameters
        group = parameters[0].ds_process_group
        self.n_processes = deepspeed.comm.get_world_size(group)
        if self.n_processes > 1:
            rank, length = deepspeed.comm.get_rank(group), sum(plan.lengths)
            self.rows = torch.empty(self.n_processes, length, dtype=parameters[0].ds_tensor.dtype, device=device)
            torch.cat([parameter.ds_tensor for parameter in parameters], out=self.rows[rank])
            self.handle = deepspeed.comm.allgather_fn(self.rows.view(-1), self.rows[rank], group=group, async_op=True)
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def holds(self, parameters: Sequence[Any]) -> bool:
        """Return True if this gather brings exactly the missing ones of `parameters`."""
        flying = {id(it) for it in parameters if it.ds_status is not ZeroParamStatus.AVAILABLE}
        return flying == {id(it) for it in self.parameters}

    def finish(self) -> None:
        """Make the current stream wait for the parameters, and give each parameter its data."""
        try:
            self._finish()
        except BaseException:
            # for example out of memory; the next gather gathers them again
            for parameter in self.parameters:
                if parameter.ds_status is ZeroParamStatus.INFLIGHT:
                    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
            raise

    def _finish(self) -> None:
        plan = self.plan
        if self.n_processes == 1:
            for parameter in self.parameters:
                parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
            return
        self.handle.wait()
        memory = self.rows.new_empty(plan.n_elements)
        places = [
            memory.as_strided((self.n_processes, length), (length, 1), start)
            for length, start in zip(plan.lengths, plan.starts, strict=True)
        ]
        torch.split_with_sizes_copy(self.rows, plan.lengths, dim=1, out=places)
        for parameter, start, stride in zip(self.parameters, plan.starts, plan.strides, strict=True):
            data = memory.as_strided(parameter.ds_shape, stride, start)
            # a view that stays would keep the memory of all parameters
            parameter.data = data.clone() if parameter.ds_persist else data
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        del self.rows


class GatheredDict(ZeROOrderedDict):
    """Parameters of a module inside a leaf module, which is gathered as a whole before any of its parameters is read.

    DeepSpeed's dictionary runs Python code at each read, to find modules that read parameters of other modules.
    """

    __getitem__ = dict.__getitem__


def read_parameters_directly(model: nn.Module) -> None:
    """Replace DeepSpeed's dictionaries of parameters inside leaf modules."""
    for leaf in [module for module in model.modules() if z3_leaf_module(module)]:
        for module in leaf.modules():
            parameters = GatheredDict(parent_module=module)
            parameters.update(dict(module._parameters.items()))
            module._parameters = parameters


def _missing(parameters: Sequence[Any]) -> list[Any]:
    missing = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    # the same order on all ranks
    return sorted(missing, key=lambda parameter: parameter.ds_id)


def _keys(parameters: Sequence[Any]) -> tuple[int, ...]:
    return tuple(parameter.ds_id for parameter in parameters)
