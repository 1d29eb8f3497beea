"""Records of JSON Lines, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import refuse

# spreadsheets put a byte order mark in front, which would become part of the first column's name
ENCODING = "utf-8-sig"


def jsonl_records(path: Path, on_bad: Callable[[ValueError], None] = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records, each with its file and line for messages.

    Args:
        path: The file.
        on_bad: Told of a line that is no JSON object, with its number; unless it raises, the next one is read.

    Raises:
        ValueError: There is one, or the file itself is damaged.
    """
    number = 0
    try:
        # bytes, for a line that cannot be decoded to be the one that is named
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = _record(line)
                except ValueError as error:
                    on_bad(ValueError(f"{path}:{number}: unreadable line ({error})"))
                    continue
                if record is not None:
                    yield f"{path}:{number}", record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number or 1}: unreadable line ({error})") from error


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None if it is blank."""
    text = line.decode(ENCODING)
    if not text.strip():
        return None
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record
