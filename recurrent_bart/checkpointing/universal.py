"""A checkpoint read by another number of processes, or under another ZeRO stage, than wrote it.

DeepSpeed's universal format holds every parameter and both moments of it whole, so each process can take its own part.
"""

import argparse
import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS

from recurrent_bart.checkpointing.checkpoint_files import read_tensors, refuse_code

# what DeepSpeed reads the counts of steps from: those of every process hold the same ones
MODEL_STATES = {2: "mp_rank_00_model_states.pt", 3: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def write_universal(shards: Path, output: Path, stage_then: int, stage_now: int) -> None:
    """Write what all processes of a checkpoint had in the universal format.

    Args:
        shards: DeepSpeed's folder of the checkpoint.
        output: Folder to write.
        stage_then: ZeRO stage that wrote it.
        stage_now: ZeRO stage that will read it.

    Raises:
        ValueError: A file holds something that would have to be run.
    """
    settings = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(output),
        # processes of its own would be forked from one that talks to others
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # ZeRO-2 does not write which parameters are split over processes: none is
        inject_missing_state=True,
    )
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        # it prints a page, and a bar for each part
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(refuse_code())
        try:
            ds_to_universal.main(settings)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{shards}: cannot be read ({str(error).splitlines()[0]})") from error
    if (stage_then == 3) != (stage_now == 3):
        _change_stage(output, stage_then, stage_now)


@contextlib.contextmanager
def reading_universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """While it lasts, the engine reads checkpoints in the universal format."""
    engine._config.load_universal_checkpoint = True
    try:
        with refuse_code():
            yield
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 has given all groups of parameters one and the same count, which each of them would then add to
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def _change_stage(universal: Path, stage_then: int, stage_now: int) -> None:
    """Put what is there in the form in which the other stage looks for it."""
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
