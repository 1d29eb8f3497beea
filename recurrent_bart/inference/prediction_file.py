"""Summaries of a file's rows, written with the rows' ids."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recurrent_bart.data.rows import HALF_CHARACTER, id_of, read_query
from recurrent_bart.data.sources import read_records
from recurrent_bart.data.text_layouts import LayoutError, read_layout
from recurrent_bart.inference.reading_session import Summary

# Number of rows that are summarised together, texts of similar length in a batch. As many again are encoded meanwhile.
WINDOW = 256
# place, id, text and question of each row
Rows = Sequence[tuple[str, Any, str, str]]


def predict_file(
    summarize: Callable[..., list[Summary]],
    source: Path,
    output: Path,
    columns: tuple[str, str],
    on_bad: Callable[[ValueError], None],
    query_column: str | None = None,
    encode_ahead: Callable[..., Iterator[tuple[Any, Any]]] | None = None,
) -> int:
    """Write a JSON line per row: the row's id, the summary, and what it was made from. Return the number of lines.

    Args:
        summarize: Function that returns a summary per text, and raises ValueError for a text without tokens. With a
            column of questions, its second argument is the question about each text.
        source: JSON Lines, JSON, CSV, TSV or Parquet file.
        output: JSON Lines file; it appears when all rows are done.
        columns: Names of the columns of texts and ids. Without a value in the id column, a row's id is the name of its
            file with the line.
        on_bad: Function that takes the error of a row without a usable text. If it returns, the row is skipped.
        query_column: Name of the column of questions; None: no questions.
        encode_ahead: `Summarizer.encode_ahead`, whose encoded texts `summarize` then takes; None: it takes texts.

    Raises:
        ValueError: The file is unreadable, or `on_bad` raises.
    """
    rows = _readable(source, (*columns, query_column), on_bad)
    windows: Iterator[Rows] = iter(lambda: list(itertools.islice(rows, WINDOW)), [])
    encode, asks = encode_ahead or _without_encoding, query_column is not None
    draft = output.with_name(output.name + ".tmp")
    n_lines = 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            for window, encoded in encode(windows, lambda window: _arguments(window, asks)):
                for id, summary in _summaries(summarize, window, asks, on_bad, encoded):
                    line = {"id": id, **summary.record()}
                    file.write(_as_json(line) + "\n")
                    n_lines += 1
        os.replace(draft, output)
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror})") from error
    finally:
        draft.unlink(missing_ok=True)
    return n_lines


def _without_encoding(items: Iterable[Any], arguments: Any) -> Iterator[tuple[Any, None]]:
    return ((item, None) for item in items)


def _arguments(rows: Rows, asks: bool) -> list[list[str]]:
    """Return the texts of rows, and their questions if there is a column of questions."""
    return [[text for _, _, text, _ in rows], *([[query for *_, query in rows]] if asks else [])]


def _readable(
    source: Path, columns: tuple[str, str, str | None], on_bad: Callable[[ValueError], None]
) -> Iterator[tuple[str, Any, str, str]]:
    """Yield the place, id, text and question of each row with a text."""
    text_column, id_column, query_column = columns
    for place, record in read_records(source, on_bad):
        id = id_of(record, id_column, place)
        try:
            query = read_query(record, query_column, place)
            text = _text(record, text_column, place)
            # an id may be a list or an object with texts
            if any(HALF_CHARACTER.search(value) for value in (text, query, _as_json(id))):
                raise ValueError(f"{place}: the text, the id or the query has half a character (a lone surrogate)")
        except ValueError as error:
            on_bad(error)
            continue
        yield place, id, text, query


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(record: dict[str, Any], column: str, place: str) -> str:
    if column not in record:
        raise ValueError(f"{place}: column {column!r} is missing; the columns are {', '.join(map(repr, record))}")
    try:
        text = read_layout(record[column])
    except LayoutError as error:
        raise ValueError(f"{place}: column {column!r} {error}") from error
    if not text.strip():
        raise ValueError(f"{place}: column {column!r} is blank")
    return text


def _summaries(
    summarize: Callable[..., list[Summary]],
    rows: Rows,
    asks: bool,
    on_bad: Callable[[ValueError], None],
    encoded: Any = None,
) -> Iterator[tuple[Any, Summary]]:
    try:
        found = summarize(*_arguments(rows, asks)) if encoded is None else summarize(encoded)
    except ValueError as error:
        if len(rows) == 1:
            on_bad(ValueError(f"{rows[0][0]}: {error}"))
            return
        # summarize each row by itself to find the unusable row
        for row in rows:
            yield from _summaries(summarize, [row], asks, on_bad)
        return
    yield from zip((id for _, id, *_ in rows), found, strict=True)
