"""Generated texts with their targets and scores, as JSON Lines."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from recurrent_bart.files import atomic_write

FILE_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Generated text with its targets and scores: one line of `predictions.jsonl`. README.md describes the fields.

    Several predictions may have the same `document`, the unit that confidence intervals resample.
    """

    id: str
    document: str
    section: int | None
    n_sections: int
    n_source_tokens: int
    n_document_tokens: int
    targets: list[str]
    text: str
    scores: dict[str, float | None]
    shares_by_tenth: dict[str, list[float] | None]
    source: str | None = None
    query: str | None = None


def unique_names(ids: Sequence[str]) -> list[str]:
    """Return one name per document: its id, with the row number appended if several documents have the same id."""
    n_documents = Counter(ids)
    return [name if n_documents[name] == 1 else f"{name} (row {index})" for index, name in enumerate(ids)]


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write one line per prediction, atomically. A source or a query that is None is left out."""
    atomic_write(path, "".join(_line(prediction) for prediction in predictions))


def _line(prediction: Prediction) -> str:
    record = asdict(prediction)
    for name in ("source", "query"):
        if record[name] is None:
            del record[name]
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_predictions(path: Path) -> list[Prediction]:
    """Read the predictions of a file.

    Raises:
        ValueError: The file is unreadable or empty, a line is no prediction, or two lines have the same id. The message
            gives file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: unreadable predictions ({error})") from error
    if lines == [""]:
        raise ValueError(f"{path}: the file has no predictions")
    predictions: dict[str, Prediction] = {}
    for number, line in enumerate(lines, start=1):
        prediction = _parse(line, f"{path}:{number}")
        if prediction.id in predictions:
            raise ValueError(f"{path}:{number}: a second prediction with the id {prediction.id!r}")
        predictions[prediction.id] = prediction
    return list(predictions.values())


def _parse(line: str, place: str) -> Prediction:
    try:
        record: Any = json.loads(line)
        known = {item.name for item in fields(Prediction)}
        prediction = Prediction(**{name: value for name, value in record.items() if name in known})
        _check_types(prediction)
        return prediction
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: not a line of {FILE_NAME} ({error})") from error


def _check_types(prediction: Prediction) -> None:
    """Raise ValueError if a field's value does not have the type that a prediction needs."""
    for name, type_ in get_type_hints(Prediction).items():
        if not _is_of_type(getattr(prediction, name), type_):
            raise ValueError(f"the value of {name!r} is of the wrong type")


def _is_of_type(value: Any, type_: Any) -> bool:
    """Return True if a value read from JSON is of a type: a class, a union, or a list or dictionary of them."""
    outer, inner = get_origin(type_), get_args(type_)
    if outer is UnionType:
        return any(_is_of_type(value, option) for option in inner)
    if outer is list:
        return isinstance(value, list) and all(_is_of_type(item, inner[0]) for item in value)
    if outer is dict:
        return isinstance(value, dict) and all(_is_of_type(item, inner[1]) for item in value.values())
    # JSON writes whole numbers without a point, and bool is a subclass of int
    return isinstance(value, (int, float) if type_ is float else type_) and not isinstance(value, bool)
