"""Reader for CSV and TSV files that detects missing quotes."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurrent_bart.data.csv_quotes import lines_are_rows
from recurrent_bart.data.rows import refuse
from recurrent_bart.data.text_files import ENCODING, check_decoded, open_text

REMEDY = 'write "..." around a field with a delimiter, quote or line end, and "" for each quote in the field'


class CsvRows:
    """Iterator over the rows of a CSV file. It also stores the raw lines of the last row."""

    def __init__(self, lines: Iterator[str], delimiter: str):
        self._lines, self.raw, self.delimiter = lines, list[str](), delimiter
        # strict=True: text after a closing quote is an error, and so is a quote that is never closed.
        self.reader = csv.reader(self._taken(), delimiter=delimiter, strict=True)

    @property
    def line(self) -> int:
        """Number of the last row's first line, counted from 1."""
        return self.reader.line_num - len(self.raw) + 1

    def next_row(self) -> list[str] | None:
        """Return the next row that is not blank, or None at the end of the file. Raise csv.Error for wrong quotes."""
        row: list[str] | None = []
        while not row and row is not None:
            self.raw.clear()
            row = next(self.reader, None)
        return row

    def _taken(self) -> Iterator[str]:
        for line in self._lines:
            self.raw.append(line)
            yield line


def csv_records(
    path: Path, on_bad: Callable[[ValueError], None] = refuse, encoding: str = ENCODING, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row as a dictionary, with its `file:line`. The first row of the file names the columns.

    `delimiter` is a comma or a tab.

    If `on_bad` returns, the faulty row is skipped. A wrong number of fields, a wrong quote and equal column names raise
    ValueError. A faulty row of several lines always raises: the start of the next row is unknown.
    """
    csv.field_size_limit(2**31 - 1)
    with open_text(path, encoding, newline="") as file:
        rows = CsvRows(iter(file), delimiter)
        names = _row(rows, path, encoding, refuse)
        check_names(names or [], f"{path}:1")
        if delimiter == "," and len(names or []) == 1 and names and ";" in names[0]:
            raise ValueError(
                f"{path}:1: the header is one column {names[0]!r}; if its delimiter is ';', save the file with commas"
            )
        while names:
            row = _row(rows, path, encoding, on_bad, len(names))
            if row is None:
                return
            if row:
                yield f"{path}:{rows.line}", dict(zip(names, row, strict=True))


def _row(
    rows: CsvRows, path: Path, encoding: str, on_bad: Callable[[ValueError], None], n_columns: int | None = None
) -> list[str] | None:
    """Return the next row, `[]` for a skipped faulty row, or None at the end of the file."""
    try:
        row = rows.next_row()
        if row is not None:
            check_decoded("".join(rows.raw), encoding)
            _check_row(row, rows, n_columns or len(row))
        return row
    except (csv.Error, ValueError) as error:
        last = rows.line + len(rows.raw) - 1
        text = _explain(error, last) if isinstance(error, csv.Error) else str(error)
        fault = ValueError(f"{path}:{rows.line}: {text}")
        (on_bad if last == rows.line else refuse)(fault)
        return []


def _explain(error: csv.Error, line: int) -> str:
    if "unexpected end of data" in str(error):
        return f"a quote has no closing quote up to line {line}; {REMEDY}"
    return f"text follows the closing quote of a field, on line {line} ({error}); {REMEDY}"


def _check_row(row: list[str], rows: CsvRows, n_columns: int) -> None:
    if len(row) != n_columns:
        raise ValueError(f"{len(row)} fields, but the first row names {n_columns} columns; {REMEDY}")
    if len(rows.raw) > 1 and n_columns > 1 and lines_are_rows(rows.raw, row, rows.delimiter):
        raise ValueError(
            f"a quoted field has {len(rows.raw)} lines, and each line is a row of {n_columns} fields without the "
            f"quotes: a quote seems to be missing; {REMEDY}. If none is, write the documents as .jsonl"
        )


def check_names(names: list[str], place: str) -> None:
    """Raise ValueError if two columns of a table have the same name. Columns without names are never read."""
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise ValueError(f"{place}: two columns are named {', '.join(map(repr, sorted(twice)))}; rename one of them")
