"""Check of a saved state, which may come from a stranger: names, types and shapes must fit this model."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.inference.bookmark import LONGEST_WORD, PIECE
from recurrent_bart.inference.shown_tokens import are_rows
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState

IDS = ("ids", "overlap")
PREFIX = "state."
# types of the numbers of a state
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# longest question; longer questions leave no room for text
QUERY_CHARACTERS = 2**16
# Most characters of each entry of the metadata, not less than a reader writes. A context is at most a text and a few
# hundred characters. The notes of the service hold 16 summaries with their citations.
MOST_CHARACTERS = {
    "text": LONGEST_WORD + 2 * PIECE,
    "context": LONGEST_WORD + 2 * PIECE,
    "query": QUERY_CHARACTERS,
    "reader": 2**16,
    "counts": 2**10,
    "notes": 2**24,
}


def check_names(names: Collection[str], path: Path) -> None:
    """Raise ValueError if a tensor of a saved state is missing, or another one is there."""
    needed = {*IDS, "spans"}
    known = needed | {PREFIX + name for name in RecurrentState.__dataclass_fields__}
    _require(needed <= {*names} <= known, "a tensor", path)


def check_sizes(metadata: Mapping[str, str], path: Path) -> None:
    """Raise ValueError if an entry of the metadata is longer than a reader writes."""
    for name, most in MOST_CHARACTERS.items():
        n_characters = len(metadata.get(name, ""))
        if n_characters > most:
            raise ValueError(
                f"{path}: not a saved state: its {name} has {n_characters} characters; at most {most} are allowed"
            )


def check_tensors(tensors: dict[str, Tensor], config: RecurrentBartConfig, path: Path) -> None:
    """Raise ValueError that names the first tensor that cannot belong to a state of a model with this configuration.

    `check_names` has accepted the names.
    """
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    # the configuration fills in both sizes
    assert config.segment_size is not None
    assert config.input_size is not None
    most = {"ids": config.segment_size, "overlap": config.input_size - config.segment_size}
    for name in IDS:
        _require(_are_ids(tensors[name], config.vocab_size, most[name]), name, path)
    if state:
        _require(_are_counts(state.get("position"), (1,)), "position", path)
        memory, shape = state.get("memory"), RecurrentState.memory_shape(config, 1)
        _require((memory is None) == (shape is None) and _are_finite(memory, shape), "memory", path)
        _check_outputs(state, ("context", "context_number"), torch.int64, config, path)
        _check_outputs(state, ("tokens", "tokens_mask"), torch.bool, config, path)
        needed = {"last": "tokens", "memory": "tokens", "all": "context"}.get(config.decoder_context)
        _require(needed is None or needed in state, f"{needed}", path)
    n_waiting = sum(len(tensors[name]) for name in IDS)
    _require(are_rows(tensors["spans"], n_waiting, _n_shown(state, config)), "spans", path)


def check_counts(counts: object, names: Sequence[str], path: Path) -> None:
    """Raise ValueError unless `counts` are whole numbers with these names."""
    values = list(counts.values()) if isinstance(counts, dict) and counts.keys() == set(names) else [None]
    # a bool is an int
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise ValueError(f"{path}: not a saved state: its counts must be whole numbers")


def _check_outputs(
    state: dict[str, Tensor], names: tuple[str, str], dtype: torch.dtype, config: RecurrentBartConfig, path: Path
) -> None:
    """Check encoder outputs `(1, A, D)` and the numbers or the mask `(1, A)` of their positions."""
    outputs, marks = (state.get(name) for name in names)
    if outputs is None and marks is None:
        return
    _require(outputs is not None and outputs.dim() == 3, names[0], path)
    assert outputs is not None
    _require(_are_finite(outputs, (1, outputs.shape[1], config.d_model)), names[0], path)
    is_fit = marks is not None and marks.dtype == dtype and tuple(marks.shape) == tuple(outputs.shape[:2])
    _require(is_fit, names[1], path)


def _n_shown(state: dict[str, Tensor], config: RecurrentBartConfig) -> int:
    """Return the number of tokens in the decoder's context."""
    mark = state.get("tokens_mask" if config.decoder_context in ("last", "memory") else "context_number")
    return 0 if mark is None else int((mark != 0).sum())


def _are_ids(ids: Tensor, vocab_size: int, most: int) -> bool:
    is_fit = ids.dtype == torch.int64 and ids.dim() == 1 and len(ids) <= most
    return is_fit and bool(((ids >= 0) & (ids < vocab_size)).all())


def _are_counts(numbers: Tensor | None, shape: tuple[int, ...]) -> bool:
    if numbers is None or numbers.dtype != torch.int64 or tuple(numbers.shape) != shape:
        return False
    return bool((numbers >= 0).all())


def _are_finite(tensor: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    if tensor is None or shape is None:
        return tensor is None and shape is None
    return tensor.dtype in DTYPES and tuple(tensor.shape) == shape and bool(tensor.isfinite().all())


def _require(is_fit: bool, name: str, path: Path) -> None:
    if not is_fit:
        raise ValueError(f"{path}: not a state of this model: {name} is missing, or has another type, shape or value")
