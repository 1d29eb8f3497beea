"""Patches of DeepSpeed objects, with the DeepSpeed names they use and the versions they were tested with.

DeepSpeed may rename a private function in any release. Replacing a name that is no longer read has no effect and raises
no error. Therefore all names are checked when an engine is built:

- A patch that saves time is skipped, with one warning, if a name is absent or the version is untested.
- A patch that is needed for correct numbers or files raises ValueError if a name is absent. It is applied under
untested versions too, with the warning.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import deepspeed
import deepspeed.ops
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import nvtx

from recurrent_bart.monitoring.progress import say
from recurrent_bart.training.zero import partition_buckets
from recurrent_bart.training.zero.accelerator_calls import on_stream
from recurrent_bart.training.zero.gradient_buckets import (
    PRIVATE,
    add_to_bucket,
    can_reduce_buckets,
    finish_reduction,
    point_to_weights,
    prepare_gradient,
    reduce_bucket,
)
from recurrent_bart.training.zero.gradient_exchange import has_offload
from recurrent_bart.training.zero.gradients_together import has_infinite, norm_of_all
from recurrent_bart.training.zero.module_gathers import (
    ModuleGathers,
    can_gather_by_module,
    read_parameters_directly,
)

# DeepSpeed versions with which the tests of this package pass
TESTED_VERSIONS = ("0.19.8",)
FLUSHES = ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3")
SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Patch:
    """Change to DeepSpeed.

    Attributes:
        purpose: Purpose of the patch, as printed in messages.
        names: DeepSpeed names that the patch uses, starting at `engine`, `optimizer`, `accelerator` or `nvtx`.
        stages: ZeRO stages that need the patch.
        apply: Applies the patch to an engine. None: the patch is applied where it is used.
        is_needed: True if numbers or files would be wrong without the patch.
    """

    purpose: str
    names: tuple[str, ...]
    stages: tuple[int, ...] = (1, 2, 3)
    apply: Callable[[DeepSpeedEngine], None] | None = None
    is_needed: bool = False

    def absent(self, engine: DeepSpeedEngine) -> list[str]:
        """Return the names in `names` that the installed DeepSpeed does not have."""
        roots = SimpleNamespace(engine=engine, optimizer=engine.optimizer, accelerator=get_accelerator(), nvtx=nvtx)
        return [name for name in self.names if not _exists(roots, name)]


def apply_patches(engine: DeepSpeedEngine) -> None:
    """Apply the patches for the ZeRO stage of an engine.

    Raises:
        ValueError: DeepSpeed lacks a name that is needed for correct numbers or files.
    """
    is_tested = deepspeed.__version__ in TESTED_VERSIONS
    left_out = []
    for patch in PATCHES:
        if engine.zero_optimization_stage() not in patch.stages:
            continue
        absent = patch.absent(engine)
        if absent and patch.is_needed:
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(absent)}, which is needed to {patch.purpose}: "
                f"install deepspeed=={TESTED_VERSIONS[-1]}"
            )
        if not patch.is_needed and (absent or not is_tested):
            left_out.append(f"{patch.purpose} (no {', '.join(absent)})" if absent else patch.purpose)
        elif patch.apply is not None:
            patch.apply(engine)
    _warn(is_tested, left_out)


def skip_shared_memory_operator() -> None:
    """Prevent a compilation that takes a minute: DeepSpeed compiles an all-reduce that only CPU inference uses."""
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if operators is None:
        say(f"warning: DeepSpeed {deepspeed.__version__} has no ops.__compatible_ops__: it may compile for a minute")
    else:
        operators[SHARED_MEMORY_OPERATOR] = False


def _exists(roots: SimpleNamespace, name: str) -> bool:
    try:
        operator.attrgetter(name)(roots)
    except AttributeError:
        return False
    return True


def _warn(is_tested: bool, left_out: list[str]) -> None:
    if is_tested and not left_out:
        return
    text = "" if is_tested else f" is not a tested version ({', '.join(TESTED_VERSIONS)})"
    slower = f"; steps are slower, because these optimisations are off: {', '.join(left_out)}" if left_out else ""
    say(f"warning: DeepSpeed {deepspeed.__version__}{text}{slower}")


def shorten_accelerator_calls(engine: DeepSpeedEngine | None = None) -> None:
    """Make DeepSpeed, in all engines, read CUDA streams from PyTorch directly and emit no profiler ranges."""
    nvtx.enable_nvtx = False
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        accelerator.current_stream = torch.accelerator.current_stream
        accelerator.stream = on_stream
        # if False, DeepSpeed records an event per gathered parameter and waits within a step until buckets are reduced;
        # the end of a step waits for all buckets anyway
        accelerator.handles_memory_backpressure = lambda: True


def _reduce_whole_buckets(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    if can_reduce_buckets(optimizer):
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = functools.partial(add_to_bucket, optimizer)
        optimizer.independent_gradient_partition_epilogue = functools.partial(finish_reduction, optimizer)
        setattr(optimizer, f"{PRIVATE}reduce_and_partition_ipg_grads", functools.partial(reduce_bucket, optimizer))


def _sum_whole_buckets(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    if partition_buckets.can_sum_partitions(optimizer):
        buckets = partition_buckets.PartitionBuckets(optimizer)
        optimizer.setup_buckets = buckets.begin
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = buckets.add
        optimizer.reduce_ipg_grads = buckets.reduce


def _update_whole_groups(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    if can_reduce_buckets(optimizer):
        optimizer._prepare_fp32_grad_for_sub_group = functools.partial(prepare_gradient, optimizer)
        optimizer._unflatten_partitioned_parameters = functools.partial(point_to_weights, optimizer)


def _gather_by_module(engine: DeepSpeedEngine) -> None:
    if can_gather_by_module(engine):
        gathers = ModuleGathers(engine)
        gathers.replace_methods(engine.optimizer.parameter_offload.param_coordinator)
        engine.optimizer._partition_all_parameters = gathers.release_all
        read_parameters_directly(engine.module)


def _point_to_weights(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    optimizer._update_model_bit16_weights = functools.partial(partition_buckets.point_to_weights, optimizer)


def _take_one_norm(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    if not has_offload(optimizer):
        optimizer.get_grad_norm_direct = functools.partial(norm_of_all, optimizer.get_grad_norm_direct)


def _check_finite_together(engine: DeepSpeedEngine) -> None:
    optimizer = engine.optimizer
    if not has_offload(optimizer):
        optimizer.has_overflow_partitioned_grads_serial = functools.partial(has_infinite, optimizer)


def _forget_skipped_gradients(engine: DeepSpeedEngine) -> None:
    """Clear gradients after a skipped step: with offload, DeepSpeed would add them to the next step's gradients."""
    optimizer = engine.optimizer
    if not optimizer.cpu_offload:
        return
    reset = optimizer.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    optimizer.reset_cpu_buffers = reset_all


def _names(owner: str, *attributes: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{attribute}" for attribute in attributes)


PATCHES = (
    Patch(
        "look up CUDA streams faster",
        (*_names("accelerator", "current_stream", "stream", "handles_memory_backpressure"), "nvtx.enable_nvtx"),
        apply=shorten_accelerator_calls,
    ),
    Patch(
        "gather parameters by module",
        (
            *_names("optimizer", "_partition_all_parameters"),
            *_names(
                "optimizer.parameter_offload",
                "offload_device",
                "zenflow",
                "zero_param_parallel_group",
                "zero_quantized_weights",
                "zero_quantized_nontrainable_weights",
                "fast_sharding_for_leaf_module",
                "_max_reuse_distance_in_numel",
                "_max_available_parameters_in_numel",
                "_prefetch_bucket_sz",
            ),
            *_names(
                "optimizer.parameter_offload.param_coordinator",
                "fetch_sub_module",
                "release_sub_module",
                "release_and_reset_all",
                "release_backward_leftovers",
                "reset_step",
                "trace_prologue",
                "is_record_trace",
            ),
            *_names("engine", "torch_autocast_enabled", "_config.zero_config.allgather_sequential"),
            "engine._config.zero_config.use_all_reduce_for_fetch_params",
        ),
        stages=(3,),
        apply=_gather_by_module,
    ),
    Patch(
        "reduce gradients by bucket",
        _names(
            "optimizer",
            f"{PRIVATE}reduce_and_partition_ipg_grads",
            f"{PRIVATE}param_id_to_grad_partition",
            "reduce_independent_p_g_buckets_and_remove_grads",
            "independent_gradient_partition_epilogue",
            "reduce_and_partition_stream",
            "reduce_bucket_size",
            "ipg_buckets",
            "fp16_groups",
            "get_param_comm_dtype",
            "_get_param_partition_group",
            "_epilogue_ran_this_backward",
            "averaged_gradients",
            "micro_step_id",
            "gradient_accumulation_dtype",
            "offload_optimizer",
            "zenflow",
            "all2all_process_group",
            "reduce_scatter",
            "enable_sanity_checks",
        ),
        stages=(3,),
        apply=_reduce_whole_buckets,
    ),
    Patch(
        "reduce gradients by bucket",
        _names(
            "optimizer",
            "_get_compact_grad_partition_buffer",
            "_gradient_reduction_buffer_dtype",
            "_use_compact_grad_partition_buffer",
            "autoep_folding_spec",
            "bit16_groups",
            "clear_grad_attribute",
            "contiguous_gradients",
            "dp_process_group",
            "get_gradient_for_reduction",
            "get_param_comm_dtype",
            "get_param_id",
            "grad_partition_insertion_offset",
            "grad_start_offset",
            "gradient_average",
            "has_moe_layers",
            "ipg_buckets",
            "micro_step_id",
            "overlap_comm",
            "params_already_reduced",
            "partition_size",
            "ready_for_gradients",
            "real_dp_process_group",
            "reduce_bucket_size",
            "reduce_independent_p_g_buckets_and_remove_grads",
            "reduce_ipg_grads",
            "reduce_scatter",
            "sequence_parallel_size",
            "setup_buckets",
            "use_multi_rank_bucket_allreduce",
            "zenflow",
        ),
        stages=(2,),
        apply=_sum_whole_buckets,
    ),
    Patch(
        "update parameter groups as a whole",
        _names(
            "optimizer",
            "_prepare_fp32_grad_for_sub_group",
            "_unflatten_partitioned_parameters",
            "fp16_partitioned_groups_flat",
            "fp16_partitioned_groups",
            "fp32_partitioned_groups_flat",
            "flatten",
            "averaged_gradients",
            "zenflow",
            "all2all_process_group",
            "reduce_scatter",
            "enable_sanity_checks",
        ),
        stages=(3,),
        apply=_update_whole_groups,
    ),
    Patch(
        "leave parameters at their weights",
        _names(
            "optimizer",
            "_update_model_bit16_weights",
            "bit16_groups_flat",
            "round_robin_bit16_groups",
            "round_robin_bit16_offsets",
        ),
        stages=(1, 2),
        apply=_point_to_weights,
    ),
    Patch("compute one norm of all gradients", ("optimizer.get_grad_norm_direct",), apply=_take_one_norm),
    Patch(
        "check all gradients together for infinities",
        _names(
            "optimizer",
            "has_overflow_partitioned_grads_serial",
            "averaged_gradients",
            "bit16_groups",
            "cpu_offload",
        ),
        stages=(1, 2),
        apply=_check_finite_together,
    ),
    Patch(
        "reduce the gradients of several passes together",
        (
            *_names("engine", "coalesce_grad_reduction", *FLUSHES, "_config.communication_data_type"),
            *_names("optimizer", "communication_data_type", "ipg_buckets", "gradient_accumulation_dtype", "dtype"),
        ),
        is_needed=True,
    ),
    Patch(
        "sum gradients in float32",
        _names("optimizer", "use_grad_accum_attribute", "cpu_offload"),
        stages=(1, 2),
        is_needed=True,
    ),
    Patch(
        "sum gradients in float32",
        _names("optimizer", "contiguous_gradients", "offload_optimizer"),
        stages=(3,),
        is_needed=True,
    ),
    Patch(
        "discard the gradients of a skipped step",
        _names("optimizer", "reset_cpu_buffers", "averaged_gradients", "cpu_offload"),
        stages=(1, 2),
        apply=_forget_skipped_gradients,
        is_needed=True,
    ),
    Patch(
        "evaluate the gathered model",
        _names(
            "optimizer",
            "leaf_parameters",
            "parameter_offload.forward_hooks",
            "parameter_offload.backward_hooks",
            "parameter_offload._remove_module_hooks",
            "parameter_offload.setup_zero_stage3_hooks",
        ),
        stages=(3,),
        is_needed=True,
    ),
    Patch(
        "write and read checkpoints",
        (*_names("engine", "checkpoint_engine", "_config.load_universal_checkpoint"), "optimizer.clip_grad"),
        is_needed=True,
    ),
    # `Checkpoints` replaces this method
    Patch("write checkpoints without scripts", ("engine._copy_recovery_script",)),
)
