"""Reader of run folders for the report. A run may be finished, running or interrupted."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from recurrent_bart.monitoring.best_metric import ROUGE, best_evaluation
from recurrent_bart.monitoring.progress import clock
from recurrent_bart.report.drawing import plain_label
from recurrent_bart.run_folder import RunFolder

GIB = 2**30
# Flags for paths and ranks, which do not change the training.
PLACES = {"output_dir", "cache_dir", "resume", "local_rank"}
ENDINGS = {0: "finished", 1: "ended by a fault", 2: "ended by a mistake in a flag or file", 75: "stopped"}

Record = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """Data of one run that the report shows.

    `records` are the lines of `metrics.jsonl`. `samples` maps ids to the generated texts of the last evaluation.
    `outcome` is None if `outcome.json` is missing. `defaults` are the default values of flags. `warnings` are texts
    about loss spikes.
    """

    name: str
    config: Record
    records: list[Record]
    samples: dict[str, Record] = field(default_factory=dict)
    outcome: Record | None = None
    defaults: Record = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def of(self, name: str) -> list[Any]:
        """Return all values of a field, without None."""
        return [record[name] for record in self.records if record.get(name) is not None]

    def last(self, name: str) -> Any:
        """Return the newest value of a field; None if there is none."""
        return next(reversed(self.of(name)), None)

    def points(self, name: str) -> Points:
        """Return (step, value) pairs of a field."""
        return [(record["step"], record[name]) for record in self.records if record.get(name) is not None]

    @property
    def label(self) -> str:
        """Name as a Matplotlib label."""
        return plain_label(self.name)

    @cached_property
    def flags(self) -> Record:
        """Values of all flags."""
        groups = self.config.get("arguments", {}).values()
        return {name: value for group in groups for name, value in group.items()}

    @cached_property
    def best(self) -> Record:
        """Evaluation of the best model by the run's `--metric_for_best_model`; empty if there is none."""
        return best_evaluation(self.records, self.best_metric)

    @property
    def best_metric(self) -> str:
        """Metric that chooses the best model."""
        return self.flags.get("metric_for_best_model", "loss")

    @cached_property
    def n_steps(self) -> int:
        """Number of optimizer steps according to the log."""
        return max([record["step"] for record in self.records], default=0)

    @property
    def max_steps(self) -> int:
        """Number of optimizer steps that the run was started for."""
        return self.config.get("resolved", {}).get("max_steps", self.flags.get("max_steps", 0))

    @cached_property
    def ending(self) -> str:
        """Sentence about the end of the run, with the reason."""
        if self.outcome is None:
            return "still running, or killed"
        ending = ENDINGS.get(self.outcome.get("code", -1), "ended")
        reason = " ".join(str(self.outcome.get("reason") or "").split())
        return f"{ending}: {reason}" if reason else ending

    def command(self) -> str:
        """Return the command line with all flags that differ from their defaults."""
        given = [f"--{name} {value}" for name, value in self.flags.items() if self._is_given(name, value)]
        return " ".join(["launch/train.py", *given])

    def _is_given(self, name: str, value: Any) -> bool:
        return name not in ("resume", "local_rank") and value is not None and value != self.defaults.get(name)


def read_run(path: Path, defaults: Mapping[str, Any], warnings: Sequence[str] = ()) -> Run:
    """Return the run stored in a folder. Raise ValueError if the folder has no `config.json`."""
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise ValueError(f"{path}: config.json is missing; give the folder of a run")
    samples = folder.read_samples()
    newest = max((sample["step"] for sample in samples), default=0)
    return Run(
        name=path.resolve().name,
        config=folder.read_config(),
        records=folder.read_metrics(),
        samples={sample["id"]: sample for sample in samples if sample["step"] == newest},
        outcome=_read_outcome(path / "outcome.json"),
        defaults=dict(defaults),
        warnings=warnings,
    )


def _read_outcome(file: Path) -> Record | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def key_metrics(run: Run) -> dict[str, str]:
    """Return the most important metrics of a run as texts. Unknown metrics are empty texts."""
    best, lowest = run.best, best_evaluation(run.records, "loss")
    share, memory = _median(run.of("model_flops_share")), run.of("memory_allocated_bytes")
    return {
        "best validation loss": _formatted(lowest.get("validation_loss"), ".4f"),
        "last training loss": _formatted(run.last("loss"), ".4f"),
        **{f"ROUGE-{name.removeprefix('rouge')}": _formatted(best.get(name), ".2f") for name in ROUGE},
        "steps": f"{run.n_steps:,} of {run.max_steps:,}",
        "tokens per second": _formatted(_median(run.of("tokens_per_second")), ",.0f"),
        "share of peak": "" if share is None else f"{100 * share:.0f} %",
        "seconds per step": _formatted(_median(run.of("step_seconds")), ".2f"),
        "peak memory": f"{max(memory) / GIB:.1f} GiB" if memory else "",
        "skipped steps": f"{len(run.of('skipped'))}",
    }


def facts(run: Run) -> dict[str, str]:
    """Return texts about a run's model, data, environment and end."""
    flags, model = run.flags, run.config.get("model", {})
    pretrained = flags.get("model_name_or_path")
    by_metric = "" if run.best_metric == "loss" else f", chosen by {run.best_metric}"
    found = {
        "state": run.ending,
        "resumed": "; ".join(_resume(resume) for resume in run.config.get("resumes", [])),
        "time left": "" if run.outcome or run.last("seconds_left") is None else clock(run.last("seconds_left")),
        "best evaluation": f"after step {run.best['step']:,}{by_metric}" if run.best else "",
        "model": pretrained or f"{flags.get('model_size', '')} from scratch",
        "architecture": _listed(model, ("encoder_layers", "decoder_layers", "d_model", "vocab_size")),
        "recurrence": _listed(
            model, ("recurrence", "prefix_attention", "pre_seq_len", "bptt_depth", "decoder_context")
        ),
        "segments": _listed(model, ("segment_size", "input_size", "max_n_segments")),
        "documents": _documents(flags),
        "cut documents": _formatted(run.last("n_cut_documents"), ","),
        "skipped documents": _formatted(run.last("n_bad_documents"), ","),
        "processes": f"{len(run.last('rank_seconds') or [])}, on {', '.join(sorted(hosts(run)))}" if hosts(run) else "",
        "evaluations": _times(run.of("evaluation_seconds")),
        "checkpoints": _times(run.of("checkpoint_seconds")),
        "retried GPU allocations": f"{run.last('memory_retries')} times" if run.last("memory_retries") else "",
        "versions": ", ".join(f"{name} {value}" for name, value in run.config.get("versions", {}).items() if value),
        "commit": run.config.get("git_commit") or "",
        "command": run.command(),
    }
    return {name: value for name, value in found.items() if value}


def _resume(resume: Record) -> str:
    changes = ", ".join(f"--{name} {now} (before: {then})" for name, (then, now) in resume["changes"].items())
    return f"after step {resume['step']:,}{changes and ' with ' + changes}"


def different_validation(runs: Sequence[Run]) -> str:
    """Return a warning if the runs do not have the same validation documents or targets, else an empty text."""
    measured = [_validation(run) for run in runs]
    if all(one == measured[0] for one in measured):
        return ""
    names = "; ".join(f"{run.name}: {_documents(run.flags)}" for run in runs)
    return f"The runs have different validation documents, so losses and ROUGE are not comparable. {names}."


def _validation(run: Run) -> Any:
    """Return a value that is equal for runs with the same validation documents and task."""
    documents = run.config.get("documents", {}).get("validation")
    # older runs do not record their documents
    names = ("dataset", "dataset_config_name", "train_file", "validation_file")
    return run.flags.get("task"), documents or [run.flags.get(name) for name in names]


def _documents(flags: Record) -> str:
    return f"{flags.get('train_file') or flags.get('dataset', '')}, one target per {_target(flags)}"


def hosts(run: Run) -> set[str]:
    """Return the host names in the log."""
    return {*run.of("slowest_host"), *run.of("fastest_host")}


def differing_flags(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the flags that differ between runs, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in PLACES)
    rows = ((name, [_shown(run.flags.get(name)) for run in runs]) for name in names)
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def slowest(run: Run) -> str:
    """Return a sentence about the rank that was most often the slowest, or an empty text for a single rank."""
    ranks = [(r["slowest_rank"], r["slowest_host"]) for r in run.records if r.get("slowest_rank") is not None]
    if len(run.last("rank_seconds") or []) < 2 or not ranks:
        return ""
    rank, host = max(ranks, key=ranks.count)
    share = 100 * ranks.count((rank, host)) / len(ranks)
    return f"slowest most often: rank {rank} on {host}, in {share:.0f} % of the log lines"


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _listed(fields: Record, names: Iterable[str]) -> str:
    return ", ".join(f"{name} {fields[name]}" for name in names if fields.get(name) is not None)


def _target(flags: Record) -> str:
    return "section" if flags.get("task") == "sections" else "document"


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _times(seconds: list[float]) -> str:
    return f"{len(seconds)}, median {median(seconds):.1f} s" if seconds else ""
