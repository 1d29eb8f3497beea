"""Records of JSON Lines, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import refuse
from recurrent_bart.data.text_files import ENCODING, check_decoded, open_text


def jsonl_records(
    path: Path, on_bad: Callable[[ValueError], None] = refuse, encoding: str = ENCODING
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the records, each with its file and line for messages.

    Args:
        path: The file.
        on_bad: Called for each line that is no JSON object. If it does not raise, the next line is read.
        encoding: Of the file.

    Raises:
        ValueError: A line is no JSON object, or the file is damaged.
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
    """Return the object of a line; None if the line is blank."""
    check_decoded(line, encoding)
    # files that were joined have a byte order mark in front of later lines too
    text = line.lstrip("\ufeff")
    if not text.strip():
        return None
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record
