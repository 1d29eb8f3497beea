"""Documents with their targets, built from checked records (JSON objects or table rows)."""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recurrent_bart.data.text_layouts import LayoutError, read_layout

SPLITS = ("train", "validation", "test")
SUMMARY_TASKS = ("document", "sections")
# Tasks whose targets are made of the text itself; see `pretraining.py`.
PRETRAINING_TASKS = ("denoise", "recall")
TASKS = SUMMARY_TASKS + PRETRAINING_TASKS
# Lone surrogates: JSON can encode them, but no tokenizer accepts them.
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """Document with its sections in order and one summary per section.

    Attributes:
        id: Name in messages and outputs: the record's id, or its file and line.
        sections: Texts; exactly one for the document task.
        summaries: Targets, one per section; empty if the section has none.
        group: Group of the record, which is never split between training and validation; None: no group.
        references: Further reference texts of each summary, for scores alone; empty: there are none.
        query: Question that the summaries answer; it stands before every segment. Empty: none.
        ending: End of `id` that names the question, if the record has a list of questions.
        is_first: True for the first row of a record.
        unread: Text of the sections after the last target. No segment has it, but it is part of the document.
        record_id: The record's id. Rows with the same id are never split between training and validation.
        section_indices: Index of each section in the record, from 0. Joined sections have the index of their first
            section. Empty: `sections` are all sections of the record.
        n_sections: Number of sections of the record; 0: `sections` are all sections of the record.
    """

    id: str
    sections: list[str]
    summaries: list[str]
    group: str | None = None
    references: list[list[str]] = field(default_factory=list)
    query: str = ""
    ending: str = ""
    is_first: bool = True
    unread: str = ""
    record_id: str | None = None
    section_indices: list[int] = field(default_factory=list)
    n_sections: int = 0

    def digest(self) -> str:
        """Return a hash of the whole text that ignores differences in white space and in Unicode normalisation."""
        text = " ".join("\n".join([*self.sections, self.unread]).split())
        # an unread section may have a lone surrogate
        return hashlib.sha256(unicodedata.normalize("NFC", text).encode(errors="surrogatepass")).hexdigest()[:16]

    def record_name(self) -> str:
        """Return the name of the record, which all its questions share."""
        return self.id.removesuffix(self.ending)

    def key(self) -> str:
        """Return the record's id, or the hash of its text if the record has no id."""
        return self.digest() if self.record_id is None else self.record_name()


@dataclass(frozen=True)
class Section:
    """Section of a record, or neighbouring sections without a summary as one.

    Attributes:
        index: Index of the section, or of the first joined section, in the record.
        summary: Target; empty if the section has none.
        references: Further reference texts of the summary.
    """

    index: int
    text: str
    summary: str
    references: list[str]


@dataclass(frozen=True)
class Columns:
    """Names of the fields of a record. Documents with the same value in field `group` belong together.

    Field `references` has a list of texts, or a list of lists for the section task. Field `query` has a question, or a
    list of objects, each with a question `query` and its summary. Commas separate the names of several lists.
    """

    text: str = "document"
    summary: str = "summary"
    sections: str = "sections"
    summaries: str = "summaries"
    group: str | None = None
    references: str | None = None
    query: str | None = None


def make_row(record: dict[str, Any], task: str, columns: Columns, place: str) -> Row:
    """Build a document from one record (a JSON object or table row). Error messages name `place`, the file and line.

    A text may have each layout of `read_layout`. For the document task, if the text column is missing, the row's list
    of sections or summaries is joined to one text. Without a summary, the first reference is the target. Pretraining
    tasks read the text alone.

    Raises:
        ValueError: A field is missing, empty or of the wrong type.
    """
    name = str(id_of(record, "id", place))
    own_id = name if _has_value(record, "id") else None
    group = _group(record, columns, place)
    query = read_query(record, columns.query, place)
    if task == "sections":
        parts = _section_fields(record, columns, place)
        return with_targets(Row(name, group=group, query=query, record_id=own_id, **parts), place)
    # A line end at the end of a file would be a token, or even a segment.
    text = _text(record, columns, ("text", "sections"), place, joined_by="\n").rstrip()
    if task in PRETRAINING_TASKS:
        return with_text(Row(name, [text], [""], group, record_id=own_id), place)
    references = _references(record, columns, place)
    has_none = record.get(columns.summary) is None and record.get(columns.summaries) is None
    summary = "" if references and has_none else _text(record, columns, ("summary", "summaries"), place, joined_by=" ")
    if references and not summary.strip():
        summary, *references = references
    lists = [references] if references else []
    return with_targets(Row(name, [text], [summary], group, lists, query, record_id=own_id), place)


def id_of(record: dict[str, Any], column: str, place: str) -> Any:
    """Return the value of the id column, or the name of the file with the line if the column has no value."""
    return record[column] if _has_value(record, column) else Path(place).name


def split_queries(record: dict[str, Any], task: str, columns: Columns, place: str) -> list[tuple[dict[str, Any], str]]:
    """Return a record for each question of a list in the query column, with the end of its name; else the record.

    Raises:
        ValueError: The list is empty, an item is no object with a question, or the task is not `"document"`.
    """
    column, questions = columns.query, _questions(record, columns, place)
    if column is None or questions is None:
        return [(record, "")]
    if task != "document":
        raise ValueError(
            f"{place}: column {column!r} has a list of questions, which needs --task document, not {task} "
            "(--query_column)"
        )
    needed = f"{place}: column {column!r} must be a text, or a list of objects with 'query' and {columns.summary!r}"
    if not questions:
        raise ValueError(f"{needed}, not an empty list (--query_column)")
    for number, item in enumerate(questions, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("query"), str):
            raise ValueError(f"{needed}; item {number} of the list has no query (--query_column)")
    names = [name for name in (columns.summary, columns.references) if name]
    rest = {name: value for name, value in record.items() if name not in (*names, columns.summaries)}
    return [
        (rest | {name: item[name] for name in names if name in item} | {column: item["query"]}, f" (query {number})")
        for number, item in enumerate(questions, start=1)
    ]


def _questions(record: dict[str, Any], columns: Columns, place: str) -> list[Any] | None:
    """Return the list of questions of a record, or the joined lists of several columns. None: there is no list."""
    column = columns.query
    if column is None or column in record or "," not in column:
        found = None if column is None else record.get(column)
        return found if isinstance(found, list) else None
    questions: list[Any] = []
    for name in column.split(","):
        own = _field(record, replace(columns, query=name.strip()), "query", place)
        if not isinstance(own, list):
            needed = f"{place}: column {name.strip()!r} must be a list of questions"
            raise ValueError(f"{needed}, not {type(own).__name__} (--query_column)")
        questions += own
    return questions


def read_query(record: dict[str, Any], column: str | None, place: str) -> str:
    """Return the question of a record, empty without a column or a value.

    Raises:
        ValueError: The column is missing, or its value is no text.
    """
    if column is None or (column in record and record[column] is None):
        return ""
    query = _field(record, Columns(query=column), "query", place)
    if not isinstance(query, str):
        kind = type(query).__name__
        raise ValueError(f"{place}: column {column!r} must be a text, not {kind} (--query_column)")
    return query.strip()


def refuse(error: ValueError) -> None:
    """Raise the error. This function is the default `on_bad`, for unusable documents."""
    raise error


def with_targets(row: Row, place: str) -> Row:
    """Return the row. Raise ValueError if all texts or summaries are blank, or `with_text` does."""
    # Check the summaries first: sections without a following target are already dropped from the row.
    if not any(summary.strip() for summary in row.summaries):
        raise ValueError(f"{place}: the summary is empty")
    return with_text(row, place)


def with_text(row: Row, place: str) -> Row:
    """Return the row. Raise ValueError if all texts are blank, or a text, the id or group has a lone surrogate."""
    if not any(section.strip() for section in row.sections):
        raise ValueError(f"{place}: the document is empty")
    for name, value in (("id", row.id), ("group", row.group)):
        if value is not None and HALF_CHARACTER.search(value):
            raise ValueError(f"{place}: the {name} has half a character (a lone surrogate)")
    for text in (row.query, *row.sections, *row.summaries, *itertools.chain.from_iterable(row.references)):
        if HALF_CHARACTER.search(text):
            raise ValueError(f"{place}: the text has half a character (a lone surrogate)")
    return row


def split_of(name: str) -> str:
    """Return the split of a document by the hash of its name: 80 % train, 10 % validation, 10 % test."""
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(digit, "train")


def _has_value(record: dict[str, Any], column: str) -> bool:
    """Return True if a field is there and neither null, blank nor NaN. Tables write a missing number as NaN."""
    value = record.get(column)
    return value is not None and value == value and str(value).strip() != ""


def _group(record: dict[str, Any], columns: Columns, place: str) -> str | None:
    """Return the group of a record, or None without a column."""
    if columns.group is None:
        return None
    value = _field(record, columns, "group", place)
    if not _has_value(record, columns.group):
        raise ValueError(f"{place}: column {columns.group!r} has no value")
    return str(value)


def _texts(record: dict[str, Any], columns: Columns, name: str, place: str) -> list[str]:
    texts = _field(record, columns, name, place)
    about = f"{place}: column {getattr(columns, name)!r} must be a list of texts"
    if not isinstance(texts, list):
        raise ValueError(f"{about}, not {type(texts).__name__} (--{name}_column)")
    found = []
    for number, text in enumerate(texts, start=1):
        try:
            found.append(read_layout(text))
        except LayoutError as error:
            raise ValueError(f"{about}; item {number} {error} (--{name}_column)") from error
    return found


def _references(record: dict[str, Any], columns: Columns, place: str) -> list[str]:
    """Return the texts of the column of references that are not blank. Without a column or a value, there are none."""
    column = columns.references
    if column is None or (column in record and record[column] is None):
        return []
    return [text for text in _texts(record, columns, "references", place) if text.strip()]


def _section_fields(record: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    """Return the fields of a row that depend on the record's sections. Sections after the last target are not read."""
    sections = _read_sections(record, columns, place)
    joined = list(_join_untargeted(sections))
    unread = joined.pop().text if joined and not joined[-1].summary else ""
    return {
        "sections": [section.text for section in joined],
        "summaries": [section.summary for section in joined],
        "references": [section.references for section in joined] if columns.references else [],
        "unread": unread,
        "section_indices": [section.index for section in joined],
        "n_sections": len(sections),
    }


def _read_sections(record: dict[str, Any], columns: Columns, place: str) -> list[Section]:
    """Return all sections of a record."""
    sections, summaries = (_texts(record, columns, name, place) for name in ("sections", "summaries"))
    if len(sections) != len(summaries):
        raise ValueError(f"{place}: {len(sections)} {columns.sections} but {len(summaries)} {columns.summaries}")
    for number, (section, summary) in enumerate(zip(sections, summaries, strict=True), start=1):
        if summary.strip() and not section.strip():
            raise ValueError(f"{place}: section {number} is empty but has a summary")
    references = _section_references(record, columns, place, len(sections))
    return [Section(index, *parts) for index, parts in enumerate(zip(sections, summaries, references, strict=True))]


def _section_references(record: dict[str, Any], columns: Columns, place: str, n_sections: int) -> list[list[str]]:
    """Return the further references of each section. Without a column or a value, there are none."""
    column = columns.references
    if column is None or (column in record and record[column] is None):
        return [[] for _ in range(n_sections)]
    lists = _field(record, columns, "references", place)
    if not isinstance(lists, list) or len(lists) != n_sections:
        raise ValueError(
            f"{place}: column {column!r} must be a list with one list of texts for each of the {n_sections} sections "
            "(--references_column)"
        )
    return [_references({column: own}, columns, place) for own in lists]


def _text(record: dict[str, Any], columns: Columns, names: tuple[str, str], place: str, joined_by: str) -> str:
    """Return the text of field `names[0]`. If it is missing, join the list in field `names[1]`."""
    column, list_column = (getattr(columns, name) for name in names)
    if record.get(column) is None and record.get(list_column) is not None:
        return joined_by.join(text for text in _texts(record, columns, names[1], place) if text)
    try:
        return read_layout(_field(record, columns, names[0], place))
    except LayoutError as error:
        raise ValueError(f"{place}: column {column!r} {error} (--{names[0]}_column)") from error


def _field(record: dict[str, Any], columns: Columns, name: str, place: str) -> Any:
    column = getattr(columns, name)
    if column not in record:
        present = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{place}: no column {column!r}; the columns are {present}; choose with --{name}_column")
    if record[column] is None:
        raise ValueError(f"{place}: column {column!r} has no value")
    return record[column]


def _join_untargeted(sections: list[Section]) -> Iterator[Section]:
    """Yield the sections with neighbouring sections without a target joined. Blank sections are left out."""
    waiting: list[Section] = []
    for section in sections:
        if not section.summary.strip():
            waiting += [section] if section.text.strip() else []
            continue
        yield from _joined(waiting)
        waiting = []
        yield replace(section, summary=section.summary.strip())
    yield from _joined(waiting)


def _joined(sections: list[Section]) -> Iterator[Section]:
    if sections:
        yield Section(sections[0].index, "\n".join(section.text for section in sections), "", [])
