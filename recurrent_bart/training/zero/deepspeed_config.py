"""Strict reader of the DeepSpeed configuration. DeepSpeed itself silently accepts a mistyped top-level key."""

import difflib
import json
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

# configurations that come with the package; --deepspeed finds them by name
CONFIGS = Path(__file__).parents[2] / "ds_configs"
AUTO = "auto"
# keys that the run sets from its flags; the file must say "auto"
FILLED = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
# keys that the user's DeepSpeed configuration file may set
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
# keys that are refused, with the reason
REFUSED = {
    "optimizer": "the optimizer is AdamW, set by --learning_rate and --weight_decay",
    "scheduler": "the schedule is set by --lr_scheduler and --warmup_steps",
    "fp16": "BART overflows in fp16; bf16 and fp32 are supported",
    "train_batch_size": "the value follows from --per_device_train_batch_size and --gradient_accumulation_steps",
    "activation_checkpointing": "use --gradient_checkpointing",
    "wandb": "use --wandb_mode",
    "tensorboard": "use --tensorboard",
    "csv_monitor": "RUN/metrics.jsonl has the metrics",
}
# sections for which DeepSpeed has a schema
SCHEMAS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
}
# sections without a schema: DeepSpeed ignores their unknown keys
PLAIN = {
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    # the run itself decides how checkpoints are written and read
    "checkpoint": {"tag_validation"},
    "flops_profiler": {
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    },
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
}


def load_deepspeed_config(path: str | Path, micro_batch: int, max_grad_norm: float, use_bf16: bool) -> dict[str, Any]:
    """Read a DeepSpeed configuration, a JSON file or the name of ours, and set the keys that only the run may set.

    The trainer itself accumulates gradients over truncated-BPTT windows and batches, so DeepSpeed's accumulation is 1.

    Raises:
        ValueError: The file cannot be read, or has an unknown key or a key that only the run may set.
    """
    try:
        config = json.loads(_find(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        _check_keys(config)
    except FileNotFoundError as error:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise ValueError(f"--deepspeed {path}: {error.strerror}; give a file, or one of the names {names}") from error
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed {path}:{error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed {path}: {error}") from error
    config = _without_auto(config)
    # DeepSpeed would by default accumulate gradients in the precision of the weights
    types = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
    return config | {
        "data_types": types,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {**config.get("bf16", {}), "enabled": use_bf16},
    }


def _find(path: str | Path) -> Path:
    """Return the file at `path`, or else our configuration of this name."""
    own = CONFIGS / f"{path}.json"
    return own if Path(path).name == str(path) and own.is_file() and not Path(path).is_file() else Path(path)


def _check_keys(config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError("the file must hold a JSON object")
    for key, value in config.items():
        if key in REFUSED and value != AUTO:
            raise ValueError(f"key {key!r} is not allowed: {REFUSED[key]}")
        if key in FILLED and value != AUTO:
            raise ValueError(f'key {key!r} must be "auto", because {FILLED[key]} sets the value')
        if key not in REFUSED:
            _check_known(key, KNOWN | FILLED.keys())
        if key in SCHEMAS or key in PLAIN:
            _check_section(key, value)
    if "zero_optimization" not in config:
        raise ValueError("key 'zero_optimization' is missing")
    if config.get("bf16", {}).get("enabled", AUTO) != AUTO:
        raise ValueError("key 'bf16.enabled' must be \"auto\", because --precision sets the value")
    stage = config["zero_optimization"].get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}; allowed are 1, 2, 3")


def _check_section(name: str, section: Any) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"{name}: must be a JSON object")
    if name in PLAIN:
        for key in section:
            _check_known(key, PLAIN[name], f"{name}.")
    else:
        _check_against(SCHEMAS[name], section, name)


def _check_against(schema: type[BaseModel], section: dict[str, Any], name: str) -> None:
    """Validate a section with DeepSpeed's schema, and report only the first error, in one line."""
    known = {field.alias or key: field for key, field in schema.model_fields.items()}
    for key, value in section.items():
        _check_known(key, known.keys(), f"{name}.")
        inner = _schema_in(known[key].annotation)
        if inner and isinstance(value, dict):
            _check_against(inner, value, f"{name}.{key}")
    try:
        schema.model_validate(_without_auto(section))
    except ValidationError as error:
        first = error.errors()[0]
        key_path = ".".join(str(part) for part in (name, *first["loc"]))
        raise ValueError(f"{key_path}: {first['msg']}") from error


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """Return the schema of a field that holds a section or an optional section, or None for any other field."""
    choices = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Remove keys with the value `auto`, so that DeepSpeed uses its defaults."""
    inner = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in section.items()}
    return {key: value for key, value in inner.items() if value != AUTO}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return section


def _check_known(key: str, known: Collection[str], place: str = "") -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown key '{place}{key}'{hint}")
