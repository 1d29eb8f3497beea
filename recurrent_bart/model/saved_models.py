"""Checks of paths to saved models; the messages say what to give instead."""

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# errors of readers of weights, configurations and truncated pickles
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    StrictDataclassError,
    SafetensorError,
    pickle.UnpicklingError,
)


def check_model_place(flag: str, place: str, may_be_on_hub: bool = False) -> None:
    """Raise a ValueError that says what to give if there is no model at the path `place` that `flag` names."""
    path = Path(place)
    if may_be_on_hub and not path.exists() and HUB_NAME.fullmatch(place):
        return
    problem = _problem(path)
    if problem:
        raise ValueError(f"{flag} {place}: {problem}")


@contextlib.contextmanager
def reading_model(flag: str, place: str) -> Iterator[None]:
    """Turn an error while reading a model's configuration or weights into a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{flag} {place}: the model cannot be read ({text}); if a file is incomplete, copy or download it again"
        ) from error


def _problem(path: Path) -> str | None:
    if path.is_file():
        return f"this is a file; give the folder of the model, {path.parent}"
    if not path.is_dir():
        return "no such folder; give the folder of a model, for example RUN/model"
    if (path / "trainer.json").is_file():
        return "this is a checkpoint; continue training with --resume RUN, or give the model of the run, RUN/model"
    config = _read_json(path / "config.json")
    if config is None:
        return "config.json is missing; give the folder of a model, for example RUN/model"
    if "arguments" not in config or "model_type" in config:
        return None
    if (path / "model" / "config.json").is_file():
        return f"this is the folder of a run; give the model of the run, {path / 'model'}"
    return "this run has not saved a model yet; a run saves a model after the first evaluation"


def _read_json(file: Path) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # the model loader reports unreadable files
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
