"""Readers for JSON Lines files, plain or compressed with gzip, and for JSON files with a list of objects."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import refuse
from recurrent_bart.data.text_files import ENCODING, check_decoded, open_text

ARRAY_START = re.compile(r"[\ufeff\s]*\[\s*")
ARRAY_DELIMITER = re.compile(r"\s*([,\]])\s*")


def jsonl_records(
    path: Path, on_bad: Callable[[ValueError], None] = refuse, encoding: str = ENCODING
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, with its `file:line` for error messages.

    If `on_bad` returns, the faulty line is skipped.

    Raises:
        ValueError: A line is not a JSON object, or the file is damaged.
    """
    number = 0
    try:
        with open_text(path, encoding) as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = _record(line, encoding)
                except ValueError as error:
                    on_bad(ValueError(f"{path}:{number}: unreadable line ({error})"))
                    continue
                if record is not None:
                    yield f"{path}:{number}", record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number or 1}: unreadable line ({error})") from error


def _record(line: str, encoding: str) -> dict[str, Any] | None:
    """Parse a line. Return None if the line is blank."""
    check_decoded(line, encoding)
    # In concatenated files, later lines can begin with a byte order mark.
    text = line.lstrip("\ufeff")
    return _object(text) if text.strip() else None


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=_with_unique_keys)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, not {type(value).__name__}")
    return value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raise ValueError if a key is repeated: only the last value would stay."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is repeated in an object")
    return found


def json_records(
    path: Path, on_bad: Callable[[ValueError], None] = refuse, encoding: str = ENCODING
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON list or of JSON Lines, with the `file:line` at which each begins.

    A list is read into memory. If `on_bad` returns, an element that is no object is skipped. Wrong JSON in a list
    always raises ValueError: the start of the next element is unknown.
    """
    with open_text(path, encoding) as file:
        if not _begins_list(file):
            yield from jsonl_records(path, on_bad, encoding)
            return
        file.seek(0)
        text = file.read()
    number, counted = 1, 0
    try:
        for start, end in _elements(text):
            number, counted = number + text.count("\n", counted, start), start
            try:
                check_decoded(text[start:end], encoding)
                record = _object(text[start:end])
            except ValueError as error:
                on_bad(ValueError(f"{path}:{number}: unreadable object ({error})"))
                continue
            yield f"{path}:{number}", record
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: unreadable list of objects ({error})") from error


def _begins_list(lines: Iterable[str]) -> bool:
    """Return True if the first character, except white space, is an opening bracket."""
    return next((text[0] == "[" for line in lines if (text := line.lstrip("\ufeff \t\r\n"))), False)


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each element of a JSON list. Raise json.JSONDecodeError for other text."""
    decoder, start = json.JSONDecoder(), ARRAY_START.match(text)
    assert start is not None
    position = start.end()
    delimiter = "]" if text.startswith("]", position) else ","
    position += delimiter == "]"
    while delimiter == ",":
        _, end = decoder.raw_decode(text, position)
        yield position, end
        found = ARRAY_DELIMITER.match(text, end)
        if found is None:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        delimiter, position = found[1], found.end()
    if text[position:].strip():
        raise json.JSONDecodeError("Extra data", text, position)
