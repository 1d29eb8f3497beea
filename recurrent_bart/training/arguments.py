"""Command line of a run. There is one dataclass per concern, and every field is a flag."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import PRETRAINING_TASKS
from recurrent_bart.data.stdlib import EMBEDDED
from recurrent_bart.model.generation_settings import without_effect
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.data_arguments import DataArguments, data_flags
from recurrent_bart.training.flags import DataclassFlagParser
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.resumed_flags import check_resumed
from recurrent_bart.training.run_arguments import ALTERNATIVES, RunArguments
from recurrent_bart.training.tracking_arguments import TrackingArguments


@dataclass
class Arguments:
    """All arguments of a run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    tracking: TrackingArguments


def build_parser() -> DataclassFlagParser:
    """Return the parser of all flags."""
    kinds = [ModelArguments, DataArguments, RunArguments, TrackingArguments]
    return DataclassFlagParser(kinds, description="Train Recurrent BART.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. With `--resume RUN`, flags that are not given keep that run's values.

    Raises:
        ValueError: A flag is unknown or out of range, there is no run to resume, or a resumed run cannot change a given
            flag.
    """
    parser = build_parser()
    known = parser.parse_flags(argv)
    given = given_flags(argv)
    folder = given.get("resume")
    if folder:
        parser.set_defaults(**_flags_of_run(folder, vars(known).keys(), given))
    arguments = Arguments(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))
    if arguments.run.max_train_documents and arguments.data.gap_sentences:
        raise ValueError("--max_train_documents and --gap_sentences: give only one of the two flags")
    metric = arguments.run.metric_for_best_model
    if arguments.data.task in PRETRAINING_TASKS and metric != "loss":
        raise ValueError(
            f"--metric_for_best_model {metric}: --task {arguments.data.task} generates no texts; give loss"
        )
    _make_paths_absolute(arguments)
    if folder:
        if Path(arguments.run.output_dir or "").absolute() != Path(folder).absolute():
            raise ValueError(
                f"--output_dir {arguments.run.output_dir}: a resumed run keeps its folder; remove the flag"
            )
        check_resumed(asdict(arguments), RunFolder(Path(folder)).read_config())
    return arguments


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the flags that a command line gives, without defaults."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args(argv)[0])


def _flags_of_run(folder: str, known: Iterable[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the saved flags of a run, without removed flags and without permissions to trust files."""
    saved = RunFolder(Path(folder)).read_config().get("arguments", {})
    resumed_names = set(known) - {"trust_checkpoint", "trust_remote_code"}
    saved = {group: data_flags(values) if group == "data" else values for group, values in saved.items()}
    flags = {name: value for group in saved.values() for name, value in group.items() if name in resumed_names}
    if given.get("max_steps", -1) > 0 and flags.get("warmup_steps") is not None:
        # the saved value may come from the earlier, larger --max_steps
        flags["warmup_steps"] = min(flags["warmup_steps"], given["max_steps"])
    for pair in ALTERNATIVES.items():
        if given.keys() & set(pair):
            flags = {name: value for name, value in flags.items() if name not in pair}
    dropped = without_effect(given.get("num_beams", 2), given.get("do_sample", True))
    flags = {name: value for name, value in flags.items() if name not in dropped}
    return flags | {"resume": folder, "output_dir": folder}


def _make_paths_absolute(arguments: Arguments) -> None:
    """Make existing paths absolute. Names on the Hugging Face Hub and missing paths stay as they are."""
    for group, names in (
        (arguments.model, ("model_name_or_path", "tokenizer_name")),
        (arguments.data, ("dataset", "train_file", "validation_file", "test_file", "cache_dir")),
        (arguments.run, ("deepspeed",)),
    ):
        for name in names:
            value = getattr(group, name)
            # the cache folder may not exist yet
            if value not in (None, EMBEDDED) and (name == "cache_dir" or Path(value).expanduser().exists()):
                setattr(group, name, str(Path(value).expanduser().absolute()))
