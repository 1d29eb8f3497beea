"""Reader for JSON Lines files, plain or compressed with gzip."""

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
    if not text.strip():
        return None
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
    return record
