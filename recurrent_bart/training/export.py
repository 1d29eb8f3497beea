"""Export of a checkpoint to a folder for `from_pretrained`, like RUN/model."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import (
    BartForConditionalGeneration,
    GenerationConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
)

from recurrent_bart.checkpointing.checkpoint_files import converting
from recurrent_bart.checkpointing.checkpoints import ENGINE
from recurrent_bart.checkpointing.manifest import problems
from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.data.tokenizer import load_tokenizer, save_tokenizer
from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.evaluation.mean_scores import mean_scores
from recurrent_bart.evaluation.predictions import read_predictions
from recurrent_bart.files import atomic_directory
from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.monitoring.progress import say
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.adapters import merged
from recurrent_bart.training.environment import refuse_pickled_code
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.model_building import force_target_language
from recurrent_bart.training.model_card import note_step, write_model_card


def export_checkpoint(
    place: Path, folder: Path, trust_remote_code: bool = False, is_plain: bool = False
) -> tuple[Path, bool]:
    """Write the model of a checkpoint, with tokenizer and generation settings, to a new folder.

    Args:
        place: Folder of a checkpoint, or of a run, whose newest whole checkpoint is exported.
        folder: Folder to write, which must not exist.
        trust_remote_code: Run code that the tokenizer brings along.
        is_plain: Write the BART or MBart without the recurrence, for programs that know only these.

    Returns:
        The folder of the checkpoint, and True if the written model lacks a recurrence that the checkpoint has.

    Raises:
        ValueError: There is no whole checkpoint, or the folder exists or cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder}: the folder exists already; give a new folder")
    checkpoint = find_checkpoint(place)
    run = RunFolder(checkpoint.absolute().parents[1])
    if not run.config_file.is_file():
        raise ValueError(f"{checkpoint}: {run.config_file} is missing; a checkpoint needs the folder of its run")
    config = run.read_config()
    model = RecurrentBartForConditionalGeneration(RecurrentBartConfig.from_dict(config["model"]))
    weights = merged(read_weights(checkpoint), _model_arguments(config))
    model.load_state_dict(weights | {name: weights[source] for name, source in model.all_tied_weights_keys.items()})
    tokenizer = load_tokenizer(str(run.tokenizer), trust_remote_code)
    if (run.model / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(run.model)
    else:
        say(f"warning: {run.model} does not exist, so the run's settings of generation are not exported")
    force_target_language(model, tokenizer)
    with atomic_directory(folder) as draft:
        (plain_bart(model) if is_plain else model).save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        if not is_plain:
            # the run measured the whole model
            step, loss, scores = _results(run, checkpoint)
            note_step(draft, step)
            write_model_card(draft, config, step, loss, scores)
    return checkpoint, is_plain and model.config.pre_seq_len > 0


def _results(run: RunFolder, checkpoint: Path) -> tuple[int, float | None, dict[str, Interval]]:
    """Return a checkpoint's step, and the validation loss and scores of this step; None and empty: not known."""
    step = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["state"]["step"]
    evaluations = [record for record in run.read_metrics() if "validation_loss" in record and record["step"] == step]
    if not evaluations:
        return step, None, {}
    return step, evaluations[-1]["validation_loss"], _scores(run, evaluations[-1])


def _scores(run: RunFolder, evaluation: Mapping[str, Any]) -> dict[str, Interval]:
    """Return the scores of the run's stored texts if an evaluation generated them; otherwise empty.

    The run stores the texts of its newest best model only. Their mean scores are in the log of their evaluation.
    """
    if not run.predictions_file.is_file():
        return {}
    scores = mean_scores(read_predictions(run.predictions_file))
    is_own = all(math.isclose(score.mean, evaluation.get(name, math.nan)) for name, score in scores.items())
    return scores if is_own else {}


def plain_bart(model: RecurrentBartForConditionalGeneration) -> PreTrainedModel:
    """Return the model's BART or MBart, without the recurrence, as the class of transformers.

    With one segment and without a recurrence it gives the same numbers. Otherwise it lacks what the recurrence learnt.
    """
    own_class = MBartForConditionalGeneration if model.config.normalize_before else BartForConditionalGeneration
    known = own_class.config_class().to_dict()
    fields = {name: value for name, value in model.config.to_dict().items() if name in known}
    fields |= {"model_type": known["model_type"], "architectures": [own_class.__name__]}
    plain = own_class(own_class.config_class(**fields))
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not is_recurrence(name)})
    plain.generation_config = model.generation_config
    return plain


def find_checkpoint(place: Path) -> Path:
    """Return the checkpoint at `place`, or the newest whole checkpoint of the run at `place`. No file is changed.

    Raises:
        ValueError: There is no checkpoint, or no whole checkpoint.
    """
    if (place / "trainer.json").is_file():
        found = [place]
    else:
        found = sorted((place / "checkpoints").glob("step-*"), reverse=True)
    if not found:
        raise ValueError(f"{place}: no checkpoint; give the folder of a run, or RUN/checkpoints/step-N")
    damage = []
    for checkpoint in found:
        problem = next(iter(problems(checkpoint)), None)
        if problem is None:
            return checkpoint
        damage.append(f"{checkpoint}: {problem}")
    raise ValueError(f"no checkpoint can be read: {'; '.join(damage)}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights in float32, joined from the shards of all ranks.

    Raises:
        ValueError: A file holds an object that could run code.
    """
    refuse_pickled_code()
    with converting(checkpoint):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE)
    return {name: tensor.float() for name, tensor in state.items()}


def _model_arguments(config: dict[str, Any]) -> ModelArguments:
    saved, known = config["arguments"]["model"], {item.name for item in fields(ModelArguments)}
    return ModelArguments(**{name: value for name, value in saved.items() if name in known})
