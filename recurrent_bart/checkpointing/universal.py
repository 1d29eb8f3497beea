"""Checkpoints that are loaded with another world size, ZeRO stage or precision.

DeepSpeed's universal format stores each parameter and its two Adam moments unsharded. Each rank reads only its part.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS

from recurrent_bart.checkpointing.checkpoint_files import converting, read_tensors, refuse_code

# file from which DeepSpeed reads the step counts, by ZeRO stage; the counts are equal on all ranks
MODEL_STATES = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def write_universal(shards: Path, output: Path, stage_then: int, stage_now: int) -> None:
    """Convert shards that ZeRO stage `stage_then` wrote to the universal format that ZeRO stage `stage_now` reads.

    Raises:
        ValueError: A file holds an object that `torch.load` refuses because it could run code.
    """
    settings = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(output),
        # more workers would be forked from a process that has a process group, which is unsafe
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # ZeRO-2 does not store which parameters use tensor parallelism; here no parameter uses it
        inject_missing_state=True,
    )
    with converting(shards):
        ds_to_universal.main(settings)
    if (stage_then == 3) != (stage_now == 3):
        _change_stage(output, stage_then, stage_now)


@contextlib.contextmanager
def reading_universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let the engine read checkpoints in the universal format, within this block."""
    engine._config.load_universal_checkpoint = True
    try:
        with refuse_code():
            yield
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 loads one step tensor that all parameter groups share, so each group would increment it once per step
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def _change_stage(universal: Path, stage_then: int, stage_now: int) -> None:
    """Convert a universal checkpoint from the file layout of stage `stage_then` to the layout of stage `stage_now`."""
    names = [MODEL_STATES[3 if stage == 3 else 2] for stage in (stage_then, stage_now)]
    (universal / names[0]).rename(universal / names[1])
    file = universal / "zero" / "optimizer_state.pt"
    state = read_tensors(file)
    parameters = [folder for folder in (universal / "zero").iterdir() if folder.is_dir()]
    if stage_now == 3:
        step = read_tensors(parameters[0] / "step.pt")
        state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: state[PARAM_GROUPS]}
    else:
        state[DS_VERSION] = deepspeed.__version__
        for parameter in parameters:
            for tensor in parameter.glob("*.pt"):
                torch.save({PARAM: read_tensors(tensor)}, tensor)
            torch.save(state[OPTIMIZER_STATE_DICT]["state"][0]["step"], parameter / "step.pt")
    torch.save(state, file)
