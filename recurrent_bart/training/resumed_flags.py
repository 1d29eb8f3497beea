"""Flags of a resumed run: which hold when they are given again, and which it keeps."""

import os
from pathlib import Path
from typing import Any

# flags by their group, as config.json has them under "arguments"
Flags = dict[str, dict[str, Any]]

# which parameters there are, what they began with, and how texts become ids
KEPT_MODEL = (
    *("model_name_or_path", "model_size", "tokenizer_name", "vocab_size", "train", "lora_r", "lora_alpha"),
    *("pre_seq_len", "prefix_projection", "prefix_hidden_size", "recurrence", "prefix_attention", "update_gate"),
    *("associative_memory", "matrix_gate_init"),
)
# what a document is, by which the run knows its place among them
KEPT_DATA = (
    *("dataset", "train_file", "validation_file", "task", "gap_sentences"),
    *("text_column", "summary_column", "sections_column", "summaries_column"),
)
PATHS = ("model_name_or_path", "tokenizer_name", "dataset", "train_file", "validation_file")
# what a validation loss is measured on
MEASURED = ("max_target_length", "max_n_segments", "segment_size", "input_size", "decoder_context", "context_segments")
# not the run's: how this start was made
OF_THE_START = ("output_dir", "resume", "local_rank", "trust_checkpoint")


def changed_flags(given: Flags, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the flags whose value is not the run's, each with the value before and now.

    Args:
        given: All flags of the resumed run.
        saved: Content of its config.json. A flag that was not given has the value that was resolved.
    """
    flags = {name: value for group in saved.get("arguments", {}).values() for name, value in group.items()}
    resolved = saved.get("model", {})
    changes = {}
    for group in given.values():
        for name, now in group.items():
            then = flags.get(name, now)
            if then is None and now is not None:
                then = resolved.get(name)
            if name not in OF_THE_START and then != now and not _is_same_path(name, then, now):
                changes[name] = (then, now)
    return changes


def check_resumed(given: Flags, saved: dict[str, Any]) -> None:
    """Refuse flags that a resumed run cannot take over; nothing was changed on disk yet.

    Raises:
        ValueError: A flag is another than the run's; the message names it.
    """
    for name, (then, now) in changed_flags(given, saved).items():
        if name not in KEPT_MODEL + KEPT_DATA or (name in PATHS and _has_moved(then)):
            continue
        was = "without it" if then is None else f"with {then}"
        raise ValueError(
            f"--{name} {now}: the run was begun {was}, and a resumed run keeps that; leave the flag out, or begin a "
            "new run, from this one's model with --model_name_or_path RUN/model"
        )


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> list[str]:
    """Return a line for the flags that hold from here on, and a warning where validation losses cannot be compared."""
    told = [f"--{name} {now} (before: {then})" for name, (then, now) in changes.items()]
    lines = [f"changed    {', '.join(told)}"] if told else []
    measured = [f"--{name}" for name in changes if name in MEASURED]
    if measured:
        lines.append(
            f"warning: {', '.join(measured)} changed what validation losses are of; the best model so far is kept by "
            "its loss from before"
        )
    return lines


def _is_same_path(name: str, then: Any, now: Any) -> bool:
    if name not in (*PATHS, "test_file", "cache_dir", "deepspeed") or then is None or now is None:
        return False
    paths = [Path(place).expanduser().absolute() for place in (then, now)]
    return paths[0] == paths[1] or (all(path.exists() for path in paths) and os.path.samefile(*paths))


def _has_moved(place: str | None) -> bool:
    """Return whether a path is no longer there, as on another machine, so that another one may stand for it."""
    return place is not None and Path(place).is_absolute() and not Path(place).exists()
