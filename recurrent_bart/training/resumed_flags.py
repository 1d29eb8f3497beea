"""Flags of a resumed run: which may change and which must stay."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from recurrent_bart.training.generation_arguments import GenerationArguments
from recurrent_bart.training.run_arguments import ALTERNATIVES, NOT_GIVEN

# changed flags, each with its value before and its value now
Changes = dict[str, tuple[Any, Any]]
# flags by group, as in the section "arguments" of config.json
Flags = dict[str, dict[str, Any]]

# flags that decide the parameters, their initial values or the tokenizer; they cannot change
KEPT_MODEL = (
    *("model_name_or_path", "model_size", "tokenizer_name", "vocab_size", "train", "lora_r", "lora_alpha"),
    *("pre_seq_len", "prefix_projection", "prefix_hidden_size", "recurrence", "prefix_attention", "update_gate"),
    *("associative_memory", "matrix_gate_init"),
)
# flags that decide what a document is; a change would invalidate the position in the data
KEPT_DATA = (
    *("dataset", "dataset_config_name", "train_file", "validation_file", "task", "gap_sentences"),
    *("text_column", "summary_column", "sections_column", "summaries_column", "references_column"),
    "query_column",
    *("max_train_documents", "max_eval_documents"),
    *("validation_share", "group_column", "held_out_by", "skip_bad_samples"),
    *("source_lang", "target_lang", "word_segmenter"),
)
PATHS = ("model_name_or_path", "tokenizer_name", "dataset", "train_file", "validation_file")
# flags that change what the validation loss measures
MEASURED = ("max_target_length", "max_n_segments", "segment_size", "input_size", "decoder_context", "context_segments")
# flags that change what ROUGE measures, besides MEASURED
GENERATED = ("eval_documents", *(item.name for item in fields(GenerationArguments)))
# flags that concern only the current start; they are not compared
NOT_COMPARED = ("output_dir", "resume", "local_rank", "trust_checkpoint")


def changed_flags(given: Flags, saved: dict[str, Any]) -> Changes:
    """Return the flags that a resumed run changes, each with its old and its new value.

    `given` holds all flags of the resumed run; `saved` is the content of config.json. If a saved flag was not
    given, the default that the run used is compared.
    """
    flags = {name: value for group in saved.get("arguments", {}).values() for name, value in group.items()}
    resolved = saved.get("model", {}) | saved.get("resolved", {})
    changes = {}
    for group in given.values():
        for name, now in group.items():
            then = flags.get(name, now)
            if then == NOT_GIVEN.get(name) != now:
                then = resolved.get(name, then)
            if name not in NOT_COMPARED and then != now and not _is_same_path(name, then, now):
                changes[name] = (then, now)
    return changes


def check_resumed(given: Flags, saved: dict[str, Any]) -> None:
    """Check that a resumed run changes no flag that must stay. Raise ValueError with the flag's name if it does."""
    for name, (then, now) in changed_flags(given, saved).items():
        if name not in KEPT_MODEL + KEPT_DATA or (name in PATHS and _has_moved(then)):
            continue
        was = "without this flag" if then is None else f"with {then}"
        raise ValueError(
            f"--{name} {now}: the run was started {was}, and a resumed run cannot change this flag. Remove the flag, "
            "or start a new run with --model_name_or_path RUN/model"
        )


def remeasured(changes: Changes, metric: str) -> list[str]:
    """Return the changed flags after which values of the metric that chooses the best model are not comparable."""
    measured = MEASURED if metric == "loss" else (*MEASURED, *GENERATED)
    return [f"--{name}" for name in changes if name in measured]


def describe_changes(changes: Changes, metric: str = "loss") -> list[str]:
    """Return a line with the changed flags, and a warning if values of `metric` are no longer comparable."""
    replaced = {name for pair in ALTERNATIVES.items() for name in pair if set(pair) <= changes.keys()}
    descriptions = [
        f"--{name} {now} (before: {then})"
        for name, (then, now) in changes.items()
        if not (name in replaced and now == NOT_GIVEN.get(name))
    ]
    lines = [f"changed    {', '.join(descriptions)}"] if descriptions else []
    measured = remeasured(changes, metric)
    if measured:
        what, values = ("the validation loss", "losses") if metric == "loss" else (metric, "values")
        lines.append(
            f"warning: {', '.join(measured)} changes what {what} measures, so earlier {values} are not "
            "comparable; the best model is still chosen by its earlier value"
        )
    if "metric_for_best_model" in changes:
        metric = changes["metric_for_best_model"][1]
        lines.append(f"best       RUN/model is replaced when an evaluation has a better {metric} than the saved model")
    return lines


def _is_same_path(name: str, then: Any, now: Any) -> bool:
    if name not in (*PATHS, "test_file", "cache_dir", "deepspeed") or then is None or now is None:
        return False
    paths = [Path(path).expanduser().absolute() for path in (then, now)]
    return paths[0] == paths[1] or (all(path.exists() for path in paths) and os.path.samefile(*paths))


def _has_moved(path: str | None) -> bool:
    """Return True if an absolute path no longer exists, for example on another host. The flag may then change."""
    return path is not None and Path(path).is_absolute() and not Path(path).exists()
