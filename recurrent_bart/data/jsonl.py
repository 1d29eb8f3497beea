"""Records of JSON Lines, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# spreadsheets put a byte order mark in front, which would become part of the first column's name
ENCODING = "utf-8-sig"


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records, each with its file and line for messages.

    Raises:
        ValueError: A line is no JSON object; the message names it.
    """
    number = 0
    try:
        # bytes, for a line that cannot be decoded to be the one that is named
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode(ENCODING)
                if not text.strip():
                    continue
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError(f"a JSON object is needed, not {type(record).__name__}")
                yield f"{path}:{number}", record
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number or 1}: unreadable line ({error})") from error
