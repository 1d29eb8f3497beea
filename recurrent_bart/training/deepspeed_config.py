"""The sharding configuration, read strictly: DeepSpeed itself accepts a mistyped top-level key in silence."""

import difflib
import json
from pathlib import Path
from typing import Any

from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

AUTO = "auto"
# keys that the run owns: "auto" in the file, filled from its flags
FILLED = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
# keys that sharding owns
KNOWN = {
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "checkpoint",
    "comms_logger",
    "flops_profiler",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "log_level",
}
# keys that something else owns
REFUSED = {
    "optimizer": "the optimizer is AdamW, set by --learning_rate and --weight_decay",
    "scheduler": "the schedule is set by --lr_scheduler and --warmup_steps",
    "fp16": "BART overflows in fp16; bf16 and fp32 are supported",
    "train_batch_size": "it follows from --per_device_train_batch_size and --gradient_accumulation_steps",
    "activation_checkpointing": "it is set by --gradient_checkpointing",
    "wandb": "monitoring is the run's own",
    "tensorboard": "monitoring is the run's own",
    "csv_monitor": "monitoring is the run's own",
}


def load_deepspeed_config(path: str | Path, micro_batch: int, max_grad_norm: float, use_bf16: bool) -> dict[str, Any]:
    """Read a DeepSpeed configuration and fill what the run owns.

    Accumulation is the trainer's own, over windows as well as batches, so DeepSpeed is told of one step.

    Args:
        path: JSON file.
        micro_batch: Documents of a forward pass.
        max_grad_norm: Norm to clip to; 0: not at all.
        use_bf16: Precision of weights and activations.

    Raises:
        ValueError: The file is unreadable, or holds a key that is unknown or is not its own.
    """
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed {path}:{error.lineno}: not JSON ({error.msg})") from error
    _check_keys(config, path)
    stage = config["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"--deepspeed {path}: zero_optimization.stage is {stage!r}; allowed are 1, 2, 3")
    return config | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {**config.get("bf16", {}), "enabled": use_bf16},
    }


def _check_keys(config: Any, path: str | Path) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: a JSON object is needed")
    for key, value in config.items():
        if key in REFUSED and value != AUTO:
            raise ValueError(f"--deepspeed {path}: key {key!r} does not belong there: {REFUSED[key]}")
        if key in FILLED and value != AUTO:
            raise ValueError(f'--deepspeed {path}: key {key!r} must be "auto": it is set by {FILLED[key]}')
        if key not in KNOWN | FILLED.keys() | REFUSED.keys():
            raise ValueError(f"--deepspeed {path}: unknown key {key!r}{_hint(key, KNOWN | FILLED.keys())}")
    if "zero_optimization" not in config:
        raise ValueError(f"--deepspeed {path}: no key 'zero_optimization'")
    _check_section(config, "zero_optimization", DeepSpeedZeroConfig, path)
    if config.get("bf16", {}).get("enabled", AUTO) != AUTO:
        raise ValueError(f"--deepspeed {path}: key 'bf16.enabled' must be \"auto\": it is set by --precision")
    _check_section(config, "bf16", DeepSpeedBF16Config, path)


def _check_section(config: dict[str, Any], name: str, schema: type[BaseModel], path: str | Path) -> None:
    """Let DeepSpeed's own schema judge a section, and say its first complaint in one line."""
    section = {key: value for key, value in config.get(name, {}).items() if value != AUTO}
    known = {field.alias or key for key, field in schema.model_fields.items()}
    for key in section:
        if key not in known | schema.model_fields.keys():
            raise ValueError(f"--deepspeed {path}: unknown key '{name}.{key}'{_hint(key, known)}")
    try:
        schema.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise ValueError(f"--deepspeed {path}: {place}: {first['msg']}") from error


def _hint(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
