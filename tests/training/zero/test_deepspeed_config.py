"""DeepSpeed configuration: keys that DeepSpeed would silently ignore are refused."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from recurrent_bart.training.zero import deepspeed_config as module
from recurrent_bart.training.zero.deepspeed_config import load_deepspeed_config

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
BASE = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def load(tmp_path):
    def write_and_load(config, use_bf16=False):
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return load_deepspeed_config(path, micro_batch=3, max_grad_norm=0.5, use_bf16=use_bf16)

    return write_and_load


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("use_bf16", [True, False])
def test_every_shipped_file_loads_and_deepspeed_takes_it(path, use_bf16):
    config = load_deepspeed_config(path, micro_batch=3, max_grad_norm=0.5, use_bf16=use_bf16)
    assert '"auto"' not in json.dumps(config)
    engine_config = DeepSpeedConfig(dict(config))
    assert engine_config.train_micro_batch_size_per_gpu == 3
    assert engine_config.gradient_clipping == 0.5
    assert engine_config.bfloat16_config.enabled == use_bf16
    assert engine_config.zero_config.stage == config["zero_optimization"]["stage"]


def test_the_shipped_files_shard_and_offload_what_their_page_says():
    found = {}
    for path in SHIPPED:
        config = DeepSpeedConfig(load_deepspeed_config(path, micro_batch=1, max_grad_norm=1.0, use_bf16=True))
        zero = config.zero_config
        moved = [part and str(part.device) for part in (zero.offload_optimizer, zero.offload_param)]
        found[path.stem] = (zero.stage, *moved)
        assert config.grad_accum_dtype == "fp32"
        # all ranks must agree on the checkpoint that they load
        assert config.checkpoint_tag_validation_fail
        assert not zero.gather_16bit_weights_on_model_save
        # DeepSpeed prints nothing between the lines of the run
        assert (config.steps_per_print, config.wall_clock_breakdown) == (1_000_000_000, False)
    assert found == {"zero2": (2, None, None), "zero3": (3, None, None), "zero3_offload": (3, "cpu", "cpu")}


def test_what_the_run_owns_is_filled(load):
    config = load(BASE | {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}, use_bf16=True)
    assert config == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 3,
        # the trainer accumulates gradients itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


# each key that a file may set, with a value that is not DeepSpeed's default
OWN = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "round_robin_gradients": True,
        "reduce_bucket_size": 1_000,
        "allgather_bucket_size": 2_000,
        "sub_group_size": 3_000,
        "stage3_prefetch_bucket_size": 4_000,
        "stage3_param_persistence_threshold": 5_000,
        "stage3_max_live_parameters": 6_000,
        "stage3_max_reuse_distance": 7_000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True, "buffer_size": 8_000},
    },
    "bf16": {"immediate_grad_update": False, "check_grad_overflow": True},
    "data_types": {
        "grad_accum_dtype": "bf16",
        "param_dtype": "fp32",
        "buffer_dtype": "fp32",
        "keep_in_fp32_modules": ["layer_norm"],
    },
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "checkpoint": {"tag_validation": "Fail"},
    "comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "debug": True},
    "flops_profiler": {
        "enabled": True,
        "recompute_fwd_factor": 0.5,
        "profile_step": 7,
        "module_depth": 2,
        "top_modules": 3,
        "detailed": False,
        "output_file": "flops.txt",
    },
    "aio": {
        "block_size": 4096,
        "queue_depth": 9,
        "intra_op_parallelism": 2,
        "single_submit": True,
        "overlap_events": False,
        # True needs a GPU
        "use_gds": False,
    },
    "steps_per_print": 11,
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "log_level": "ERROR",
}


def test_the_table_of_this_file_holds_every_key_that_a_file_may_set():
    assert OWN.keys() == module.KNOWN
    assert {name: set(OWN[name]) for name in module.PLAIN} == module.PLAIN


def test_every_key_of_the_file_is_handed_on_as_it_is(load):
    found = load(OWN | dict.fromkeys((*module.FILLED, *module.REFUSED), "auto"), use_bf16=True)
    assert found == OWN | {
        "bf16": {**OWN["bf16"], "enabled": True},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
    }


def test_deepspeed_reads_every_key_under_its_name(load):
    found = DeepSpeedConfig(load(OWN, use_bf16=True))
    zero = found.zero_config.model_dump(mode="json")
    # DeepSpeed's fields have the key as alias
    names = {field.alias or name: name for name, field in type(found.zero_config).model_fields.items()}
    for key, value in OWN["zero_optimization"].items():
        inner = zero[names[key]]
        assert (value.items() <= inner.items()) if isinstance(value, dict) else (inner == value), key
    assert found.bfloat16_config.enabled
    assert (found.bfloat16_config.immediate_grad_update, found.bfloat16_config.check_grad_overflow) == (False, True)
    types = OWN["data_types"]
    assert {name: getattr(found, name) for name in types} == types
    assert found.communication_data_type == torch.float32
    assert (found.zero_allow_untested_optimizer, found.zero_force_ds_cpu_optimizer) == (True, False)
    assert found.checkpoint_tag_validation_fail
    assert OWN["comms_logger"].items() <= found.comms_config.comms_logger.model_dump().items()
    assert OWN["flops_profiler"].items() <= vars(found.flops_profiler_config).items()
    assert OWN["aio"].items() <= found.aio_config.items()
    assert (found.steps_per_print, found.wall_clock_breakdown, found.memory_breakdown) == (11, True, True)
    assert found.log_level == "ERROR"


@pytest.mark.parametrize("name", sorted(module.REFUSED))
def test_a_key_of_the_run_is_refused_in_a_file_with_the_reason(load, name):
    with pytest.raises(ValueError, match=f"key '{name}' is not allowed: {module.REFUSED[name]}"):
        load(BASE | {name: {}})


@pytest.mark.parametrize("name", sorted(module.FILLED))
def test_a_key_that_a_flag_sets_is_refused_in_a_file_with_the_flag(load, name):
    with pytest.raises(
        ValueError, match=f"key '{name}' must be \"auto\", because {module.FILLED[name]} sets the value"
    ):
        load(BASE | {name: 1})


@pytest.mark.parametrize(
    ("types", "found"),
    [({}, "fp32"), ({"grad_accum_dtype": "auto"}, "fp32"), ({"grad_accum_dtype": "bf16"}, "bf16")],
    ids=str,
)
def test_gradients_are_summed_in_float32_unless_the_file_says_otherwise(load, types, found):
    assert load(BASE | {"data_types": types}, use_bf16=True)["data_types"] == {"grad_accum_dtype": found}


def test_auto_elsewhere_leaves_it_to_deepspeed(load):
    """Accept files for Hugging Face's Trainer, which replaces `auto` by its formulas."""
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}
    config = load({"zero_optimization": zero, "train_batch_size": "auto", "optimizer": "auto"})
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert config.keys() == BASE.keys() | {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "data_types",
    }
    DeepSpeedConfig(dict(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"no_such_thing": 1}, "unknown key 'no_such_thing'$"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "unknown key 'zero_optimization.overlap_com'; did you mean 'overlap_comm'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}},
            "unknown key 'zero_optimization.offload_optimizer.devise'; did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            "zero_optimization.offload_param.device: Input should be 'none', 'cpu' or 'nvme'",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size: "),
        ({"zero_optimization": 2}, "zero_optimization: must be a JSON object"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; allowed are 1, 2, 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage is None; allowed are 1, 2, 3"),
        ({"bf16": {"enable": "auto"}}, "unknown key 'bf16.enable'; did you mean 'enabled'?"),
        ({"bf16": {"enabled": True}}, "key 'bf16.enabled' must be \"auto\", because --precision sets the value"),
        ({"bf16": True}, "bf16: must be a JSON object"),
        (
            {"data_types": {"grad_accum_type": "fp32"}},
            "unknown key 'data_types.grad_accum_type'; did you mean 'grad_accum_dtype'?",
        ),
        ({"checkpoint": {"tag_valid": "Fail"}}, "unknown key 'checkpoint.tag_valid'; did you mean 'tag_validation'?"),
        ({"checkpoint": {"use_node_local_storage": True}}, "unknown key 'checkpoint.use_node_local_storage'"),
        ({"comms_logger": {"enable": True}}, "unknown key 'comms_logger.enable'; did you mean 'enabled'?"),
        ({"flops_profiler": {"profile_steps": 2}}, "unknown key 'flops_profiler.profile_steps'; did you mean"),
        ({"aio": {"queue": 2}}, "unknown key 'aio.queue'"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "key 'train_micro_batch_size_per_gpu' must be \"auto\", because --per_device_train_batch_size",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "key 'gradient_accumulation_steps' must be \"auto\", because --gradient_accumulation_steps",
        ),
        ({"gradient_clipping": 1.0}, "key 'gradient_clipping' must be \"auto\", because --max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "key 'optimizer' is not allowed: the optimizer is AdamW, set by"),
        ({"scheduler": {"type": "WarmupLR"}}, "key 'scheduler' is not allowed: the schedule is set by"),
        ({"fp16": {"enabled": True}}, "key 'fp16' is not allowed: BART overflows in fp16"),
        ({"train_batch_size": 32}, "key 'train_batch_size' is not allowed: the value follows from"),
        ({"activation_checkpointing": {}}, "is not allowed: use --gradient_checkpointing"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_key(load, changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        load(BASE | changes)
    assert str(caught.value).startswith("--deepspeed ")
    assert "ds.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"ds.json:1: not JSON"),
        ('{\n  "zero_optimization": {"stage": 2},\n}', r"ds.json:3: not JSON"),
        ("[]", r"ds.json: the file must hold a JSON object"),
        ("{}", r"ds.json: key 'zero_optimization' is missing"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', r"ds.json: key 'stage' appears twice"),
    ],
)
def test_unreadable_files_are_refused(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--deepspeed .*none.json: No such file"):
        load_deepspeed_config(tmp_path / "none.json", 1, 1.0, False)
