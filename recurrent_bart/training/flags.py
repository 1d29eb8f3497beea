"""Command-line parsers that accept no abbreviated flags and suggest the right flag for an unknown one."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from transformers.hf_argparser import HfArgumentParser, string_to_bool

# flags of Hugging Face's Trainer and example scripts, with this package's equivalent flags
HUGGING_FACE_FLAGS = {
    "batch_size": ("per_device_train_batch_size",),
    "bf16": ("precision",),
    "checkpointing_steps": ("save_every",),
    "config_name": ("model_name_or_path",),
    "dataset_name": ("dataset",),
    "early_stopping_patience": ("patience",),
    "eval_accumulation_steps": ("per_device_eval_batch_size",),
    "eval_steps": ("eval_every",),
    "eval_strategy": ("eval_every",),
    "evaluation_strategy": ("eval_every",),
    "fp16": ("precision",),
    "generation_max_length": ("max_new_tokens", "max_target_length"),
    "generation_num_beams": ("num_beams",),
    "label_smoothing": ("label_smoothing_factor",),
    "learning_rate_scheduler": ("lr_scheduler",),
    "logging_steps": ("log_every",),
    "lr": ("learning_rate",),
    "max_eval_samples": ("limit",),
    "max_length": ("max_target_length", "max_new_tokens"),
    "max_predict_samples": ("limit",),
    "max_source_length": ("max_n_segments", "segment_size"),
    "model": ("model_name_or_path",),
    "model_name_or_path": ("model",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "num_train_epochs": ("max_steps",),
    "num_train_steps": ("max_steps",),
    "overwrite_output_dir": ("output_dir", "resume"),
    "per_device_eval_batch_size": ("batch_size",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "preprocessing_num_workers": ("dataloader_num_workers",),
    "report_to": ("wandb_mode", "tensorboard"),
    "resume_from_checkpoint": ("resume",),
    "run_name": ("output_dir", "wandb_group"),
    "save_steps": ("save_every",),
    "save_strategy": ("save_every",),
    "save_total_limit": ("keep_last",),
    "test_batch_size": ("batch_size",),
    "train_batch_size": ("per_device_train_batch_size",),
    "val_max_target_length": ("max_target_length",),
}
# hints that are printed after the suggested flag
NOTES = {
    "num_train_epochs": "which counts optimizer steps",
    "overwrite_output_dir": "because a run is never overwritten: give another folder, or continue the old run",
    "resume_from_checkpoint": "which takes the folder of the run and finds its last checkpoint",
}


class FlagParser(argparse.ArgumentParser):
    """Parser of a script. A mistake prints one line on standard error and exits with code 2."""

    def __init__(self, description: str | None, epilog: str | None = None):
        super().__init__(description=description, epilog=epilog, allow_abbrev=False)

    def parse_flags(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse a command line in which every flag must be known."""
        problem = describe_unknown_flag(self, args)
        if problem:
            self.error(problem)
        return self.parse_args(args)

    def error(self, message: str) -> NoReturn:
        """Print the mistake without argparse's usage text, and exit."""
        self.exit(2, f"error: {message}\n")


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows each default, except None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class DataclassFlagParser(HfArgumentParser):
    """Parser of dataclasses. A mistake raises ValueError, so that only rank 0 prints it."""

    def __init__(self, dataclass_types: Sequence[type], description: str):
        super().__init__(
            dataclass_types,
            description=description,
            usage="%(prog)s [--flag value ...]",
            allow_abbrev=False,
            formatter_class=DefaultsFormatter,
        )
        allow_bare_booleans(self)

    def parse_flags(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse a command line. Raise ValueError if an argument is unknown or has no usable value."""
        problem = describe_unknown_flag(self, args)
        if problem:
            raise ValueError(problem)
        given, unknown = self.parse_known_args(args)
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}")
        return given

    def error(self, message: str) -> NoReturn:
        """Raise ValueError. argparse would print the message on every rank."""
        raise ValueError(message)


def allow_bare_booleans(parser: argparse.ArgumentParser) -> None:
    """Let optional booleans, for example --do_sample, stand without a value: the value is then true."""
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True


def describe_unknown_flag(parser: argparse.ArgumentParser, args: Sequence[str]) -> str | None:
    """Return an error message for the first unknown flag, or None if all flags are known."""
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    for argument in args:
        if "\r" in argument:
            return f"argument {argument!r}: remove the carriage return, which comes from a file with Windows line ends"
        if argument == "--":
            return None
        # argparse treats a text that contains a space as a value
        if argument.startswith("--") and " " not in argument and argument.split("=")[0] not in known:
            return f"unknown argument {argument}{suggest_flag(argument, known)}"
    return None


def suggest_flag(argument: str, known: Sequence[str]) -> str:
    """Return text that suggests known flags in place of an unknown flag, or an empty text."""
    name = argument.split("=")[0].removeprefix("--").replace("-", "_")
    ours = [f"--{flag}" for flag in HUGGING_FACE_FLAGS.get(name, ()) if f"--{flag}" in known]
    if ours:
        note = f", {NOTES[name]}" if name in NOTES else ""
        return f"; use {' and '.join(ours)}{note}"
    begun = [flag for flag in known if flag.startswith(f"--{name}")]
    close = begun[:1] or difflib.get_close_matches(f"--{name}", known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
