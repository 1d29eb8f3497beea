"""Summaries of a file's rows, written with the rows' ids."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import HALF_CHARACTER
from recurrent_bart.data.sources import read_records
from recurrent_bart.inference.reading_session import Summary

# Number of rows in memory at a time. Texts of similar length share a batch.
WINDOW = 256
Rows = Sequence[tuple[str, Any, str]]


def predict_file(
    summarize: Callable[[Sequence[str]], list[Summary]],
    source: Path,
    output: Path,
    columns: tuple[str, str],
    on_bad: Callable[[ValueError], None],
) -> int:
    """Write a JSON line per row: the row's id, the summary, and what it was made from. Return the number of lines.

    Args:
        summarize: Function that returns a summary per text, and raises ValueError for a text without tokens.
        source: JSON Lines, JSON, CSV, TSV or Parquet file.
        output: JSON Lines file; it appears when all rows are done.
        columns: Names of the columns of texts and ids. Without an id column, a row's `file:line` is its id.
        on_bad: Function that takes the error of a row without a usable text. If it returns, the row is skipped.

    Raises:
        ValueError: The file is unreadable, or `on_bad` raises.
    """
    rows = _readable(source, columns, on_bad)
    draft = output.with_name(output.name + ".tmp")
    n_lines = 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            while window := list(itertools.islice(rows, WINDOW)):
                for id, summary in _summaries(summarize, window, on_bad):
                    line = {"id": id, **summary.record()}
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                    n_lines += 1
        os.replace(draft, output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from error
    finally:
        draft.unlink(missing_ok=True)
    return n_lines


def _readable(source: Path, columns: tuple[str, str], on_bad: Callable[[ValueError], None]) -> Iterator[Any]:
    """Yield the place, id and text of each row with a text."""
    text_column, id_column = columns
    for place, record in read_records(source, on_bad):
        text = record.get(text_column)
        id = record.get(id_column, place)
        if any(isinstance(value, str) and HALF_CHARACTER.search(value) for value in (text, id)):
            on_bad(ValueError(f"{place}: the text or the id has half a character (a lone surrogate)"))
        elif isinstance(text, str) and text.strip():
            yield place, id, text
        else:
            present = ", ".join(map(repr, record))
            found = "is blank" if isinstance(text, str) else "is no text"
            problem = found if text_column in record else f"is missing; the columns are {present}"
            on_bad(ValueError(f"{place}: column {text_column!r} {problem}"))


def _summaries(
    summarize: Callable[[Sequence[str]], list[Summary]], rows: Rows, on_bad: Callable[[ValueError], None]
) -> Iterator[tuple[Any, Summary]]:
    try:
        found = summarize([text for _, _, text in rows])
    except ValueError as error:
        if len(rows) == 1:
            on_bad(ValueError(f"{rows[0][0]}: {error}"))
            return
        # summarize each row by itself to find the unusable row
        for row in rows:
            yield from _summaries(summarize, [row], on_bad)
        return
    yield from zip((id for _, id, _ in rows), found, strict=True)
