"""Model card: the README.md of a saved model says what it learnt from, how well it does, and how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.monitoring.fields import SCORES, WORD_SCORES
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.run_arguments import RunArguments

FILE_NAME = "README.md"
# file of a saved model with the optimizer steps of its weights
STEP_FILE = "training_step.json"
# scores in the front matter, which the Hugging Face hub shows
HUB_SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
KINDS = {"model": ModelArguments, "data": DataArguments, "run": RunArguments}
# flags that say nothing about the model
UNTOLD = (
    "output_dir",
    "resume",
    "cache_dir",
    "local_rank",
    "trust_checkpoint",
    "trust_remote_code",
)
USE = """```python
from recurrent_bart import Summarizer

summarizer = Summarizer.from_pretrained("FOLDER")
print(summarizer("a text of any length"))
```

The package `recurrent-bart` must be installed. Then `recurrent-bart summarize --model FOLDER text.txt` and
`AutoModelForSeq2SeqLM.from_pretrained("FOLDER", trust_remote_code=True)` work too."""
LIMITS = """The model was trained and measured only on the documents above. Other languages and kinds of text were not
measured. A summary may state what the document does not say: check it before you rely on it."""


def note_step(folder: Path, step: int) -> None:
    """Write the number of optimizer steps of the weights in a model's folder."""
    (folder / STEP_FILE).write_text(json.dumps({"step": step}) + "\n")


def noted_step(folder: Path) -> int | None:
    """Return the number of `note_step`; None: an older version saved the model."""
    note = folder / STEP_FILE
    return json.loads(note.read_text())["step"] if note.exists() else None


def write_model_card(
    folder: Path, config: Mapping[str, Any], step: int, loss: float | None, scores: Mapping[str, Interval]
) -> None:
    """Write the card of a model.

    Args:
        folder: Folder of the model.
        config: Content of the run's config.json.
        step: Optimizer steps of the model.
        loss: Validation loss; None: not measured.
        scores: Scores on the validation documents; empty: not measured.
    """
    arguments = config.get("arguments", {})
    flags = changed_flags(arguments)
    model = arguments.get("model", {})
    has_state = model.get("pre_seq_len") != 0 and model.get("recurrence") != "none"
    data, validation_data = data_names(arguments.get("data", {}))
    parts = [
        f"---\n{front_matter(validation_data, scores)}\n---",
        f"# Recurrent BART, trained on {data}",
        "A BART that reads documents of any length, segment by segment."
        + (" A state is carried from segment to segment." if has_state else ""),
        "## Use",
        USE,
        "## Training",
        f"{step} optimizer steps on `{data}`. Flags that differ from their defaults:",
        _table(("flag", "value"), [(f"`--{name}`", f"`{value}`") for name, value in flags.items()]),
        _code(config),
        "## Results",
        results(loss, scores),
        "## Limits",
        LIMITS,
    ]
    (folder / FILE_NAME).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def data_names(flags: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the training and of the validation documents, without the folders of a path.

    As in `find_sources`, a training file replaces the data set, and a validation file its validation split.
    """
    train = _public(flags.get("train_file") or flags.get("dataset")) or "documents of a file"
    return train, _public(flags.get("validation_file")) or train


def front_matter(validation_data: str, scores: Mapping[str, Interval]) -> str:
    """Return the card's YAML with the scores on the validation documents. JSON is YAML too, and quotes all texts."""
    metrics = [
        {"type": "rouge", "name": name, "value": round(scores[name].mean, 4)} for name in HUB_SCORES if name in scores
    ]
    task = {"type": "summarization", "name": "Summarization"}
    data = {"type": "text", "name": validation_data, "split": "validation"}
    result = {"task": task, "dataset": data, "metrics": metrics}
    content = {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "summarization",
        "tags": ["recurrent-bart", "summarization", "long-documents"],
        **({"model-index": [{"name": "recurrent-bart", "results": [result]}]} if metrics else {}),
    }
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items())


def results(loss: float | None, scores: Mapping[str, Interval]) -> str:
    """Return a table of the results on the validation documents of the run."""
    if loss is None:
        return "This checkpoint was not evaluated."
    rows = [("loss", f"{loss:.4f}", "nats per target token")]
    rows += [(name, f"{value:.2f}", (SCORES | WORD_SCORES).get(name, "")) for name, value in scores.items()]
    text = "On the run's validation documents; in brackets the 95 % interval over documents."
    return f"{text}\n\n{_table(('score', 'mean', 'meaning'), rows)}"


def changed_flags(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the flags that differ from their defaults. Of a path, only the last part is shown."""
    defaults = {group: {item.name: item.default for item in fields(kind)} for group, kind in KINDS.items()}
    return {
        name: _public(value)
        for group, known in defaults.items()
        for name, value in arguments.get(group, {}).items()
        if name in known and name not in UNTOLD and value is not None and value != known[name]
    }


def _code(config: Mapping[str, Any]) -> str:
    """Return the commit of the package, if the run knew it, and the versions of packages."""
    commit = config.get("git_commit")
    return (f"Code: commit {commit}. " if commit else "") + f"Packages: {_listed(config.get('versions', {}))}."


def _public(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _listed(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
