"""Sources of documents: the embedded corpus, files, folders of texts, saved data sets, data sets by name."""

import csv
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, get_dataset_split_names, load_dataset, load_dataset_builder

from recurrent_bart.data.csv_records import check_names, csv_records
from recurrent_bart.data.folders import SPLIT_OF_NAME, find_saved, find_splits, find_texts, kind_of, name_some
from recurrent_bart.data.gap_sentences import gap_sentence_rows
from recurrent_bart.data.held_out import HeldOut, held_out_texts, split_by_line
from recurrent_bart.data.jsonl import json_records, jsonl_records
from recurrent_bart.data.rows import SPLITS, Columns, Row, make_row, refuse, split_queries
from recurrent_bart.data.stdlib import EMBEDDED, library_root, stdlib_rows
from recurrent_bart.data.text_files import ENCODING, read_text

OnBad = Callable[[ValueError], None]
Records = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Source:
    """Documents of one split.

    Attributes:
        kind: `"stdlib"`, `"file"`, `"folder"`, `"saved"` (by `save_to_disk`) or `"hub"`.
        place: Path of a file or folder, or name of a data set.
        config_name: Configuration of a data set by name; empty: its only one.
        hub_split: Name of the split in the data set.
        held_out: Rule that selects validation documents if there is no validation split.
        skips_bad: True if unusable documents are skipped.
        n_made: Maximum number of additional rows per document, which are made from its own sentences.
        needs_summary: True if a text in a folder needs a file with its summary.
        notes: One line for each file or split that is not read.
    """

    kind: str
    place: str
    split: str
    files: tuple[Path, ...] = ()
    config_name: str = ""
    hub_split: str = ""
    held_out: HeldOut | None = None
    skips_bad: bool = False
    n_made: int = 0
    encoding: str = ENCODING
    needs_summary: bool = True
    notes: tuple[str, ...] = ()

    def identity(self) -> list[Any]:
        """Return values that change with the documents: file sizes and times, versions, settings. Reads no document."""
        if self.kind == "hub":
            builder = load_dataset_builder(self.place, self.config_name or None)
            name = [self.place, self.config_name] if self.config_name else self.place
            return [self.kind, name, self.hub_split, str(builder.info.version), builder.hash, *self._choices()]
        return [self.kind, [_stamp(file) for file in self._read()], *self._choices()]

    def _choices(self) -> list[Any]:
        held_out = self.held_out and [self.held_out.share, self.held_out.rule]
        return [self.split, held_out, self.skips_bad, self.n_made, self.encoding]

    def _read(self) -> list[Path]:
        if self.kind == EMBEDDED:
            return sorted(Path(self.place).rglob("*.py"))
        if self.kind == "folder":
            pairs, _ = find_texts(Path(self.place), self.needs_summary)
            return [file for pair in pairs for file in (pair.summary, pair.text) if file]
        return list(self.files)

    def rows(self, task: str, columns: Columns, on_skip: OnBad = lambda error: None) -> Iterator[Row]:
        """Yield the documents in order. `on_skip` receives the error of each skipped document.

        Raises:
            ValueError: A record is unreadable or has no text or no target (the message gives file and line), or the
                split is empty.
        """
        is_empty = True
        if self.held_out is None:
            columns = replace(columns, group=None)
        split = self._split_of_rows(task, columns)
        for row in self._all_rows(task, columns, on_skip):
            if split(row) != self.split:
                continue
            is_empty = False
            yield row
            if self.n_made and row.is_first:
                yield from gap_sentence_rows(row, self.n_made, task)
        if is_empty:
            raise ValueError(f"{self.place}: no documents with a target for --task {task} in split {self.split!r}")

    def _split_of_rows(self, task: str, columns: Columns) -> Callable[[Row], str]:
        """Return a function that maps a document to its split."""
        if self.held_out is None:
            return lambda row: self.split
        if self.held_out.rule == "line":
            return split_by_line
        whole = replace(self, split="train", n_made=0)
        held_out = _held_out_texts(whole, task, columns, json.dumps(whole.identity()))
        return lambda row: "validation" if row.digest() in held_out else "train"

    def _all_rows(self, task: str, columns: Columns, on_skip: OnBad) -> Iterator[Row]:
        """Yield the documents of all splits that the files contain."""
        if task == "sections":
            self._check_lists()
        if self.kind == EMBEDDED:
            self._check_embedded(columns)
            yield from stdlib_rows(self.split, task)
            return
        on_bad = on_skip if self.skips_bad else refuse
        readers = {"file": _file_records, "folder": _folder_records, "saved": _saved_records, "hub": _hub_records}
        for place, record in readers[self.kind](self, on_bad):
            try:
                parts = split_queries(record, task, columns, place)
            except ValueError as error:
                on_bad(error)
                continue
            is_first = True
            for part, ending in parts:
                try:
                    row = make_row(part, task, columns, place)
                except ValueError as error:
                    on_bad(error)
                    continue
                yield replace(row, id=row.id + ending, ending=ending, is_first=is_first)
                is_first = False

    def _check_embedded(self, columns: Columns) -> None:
        given = {"query_column": columns.query, "references_column": columns.references}
        for flag, column in given.items():
            if column is not None:
                raise ValueError(f"--{flag} {column}: the documents of --dataset {EMBEDDED} have no columns")

    def _check_lists(self) -> None:
        tables = [str(file) for file in self.files if kind_of(file) in (".csv", ".tsv")]
        if self.kind == "folder" or tables:
            kind, place = ("a CSV or TSV file", tables[0]) if tables else ("a folder of text files", self.place)
            raise ValueError(
                f"{place}: --task sections needs lists of texts, and {kind} has no lists; give JSON Lines, a JSON list "
                "or Parquet, or remove --task sections"
            )


@functools.lru_cache(maxsize=4)
def _held_out_texts(source: Source, task: str, columns: Columns, identity: str) -> frozenset[str]:
    """Select the validation documents once per source. A changed `identity` (after a change of files) selects again."""
    assert source.held_out is not None
    rows = source._all_rows(task, columns, lambda error: None)
    return held_out_texts(rows, source.held_out.share, source.place)


def _stamp(file: Path) -> list[Any]:
    # A broken symbolic link has its own size and time.
    stat = file.stat() if file.exists() else file.lstat()
    return [str(file), stat.st_size, stat.st_mtime_ns]


def find_sources(
    dataset: str,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    held_out: HeldOut | None = None,
    config_name: str = "",
    needs_summary: bool = True,
) -> dict[str, Source]:
    """Find the source of each split. Without a validation split, `held_out` selects training documents for validation.

    `dataset` is `"stdlib"`, a file, a folder of texts, a folder with files or folders named `train.*`, `validation.*`,
    `test.*` or similar, a folder written by `save_to_disk`, or the name of a data set for `datasets.load_dataset`, with
    its configuration `config_name`. Each of the three files (or folders of one split) replaces a split of `dataset`.
    With a training file, or with any file beside `"stdlib"`, `dataset` is ignored. Without `needs_summary`, texts in
    folders need no summary.

    Raises:
        ValueError: A file does not exist or has an unknown type.
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: _path_source((Path(path),), split, needs_summary) for split, path in given.items() if path}
    if dataset == EMBEDDED and not files:
        return {split: Source(EMBEDDED, str(library_root()), split) for split in SPLITS}
    has_all = "train" in files or dataset == EMBEDDED
    sources = files if has_all else _sources_of(dataset, config_name, needs_summary) | files
    if "train" in sources and "validation" not in sources:
        whole = replace(sources["train"], held_out=held_out or HeldOut())
        sources |= {split: replace(whole, split=split) for split in ("train", "validation")}
    return sources


def _sources_of(dataset: str, config_name: str, needs_summary: bool) -> dict[str, Source]:
    if Path(dataset).exists():
        return _sources_at(Path(dataset), needs_summary)
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix:
        raise ValueError(f"{dataset}: no such file or folder")
    return _hub_sources(dataset, config_name)


def _sources_at(place: Path, needs_summary: bool) -> dict[str, Source]:
    if place.is_file():
        return {"train": _path_source((place,), "train", needs_summary)}
    found, notes = find_splits(place)
    if not found:
        return {"train": _path_source((place,), "train", needs_summary)}
    sources = {split: _path_source(found[split], split, needs_summary) for split in SPLITS if split in found}
    return _with_notes(sources, notes)


def _with_notes(sources: dict[str, Source], notes: tuple[str, ...]) -> dict[str, Source]:
    """Add notes about a whole data set to the first source of the data set."""
    first = next(iter(sources), None)
    if first is None:
        return sources
    return sources | {first: replace(sources[first], notes=(*notes, *sources[first].notes))}


def _path_source(paths: tuple[Path, ...], split: str, needs_summary: bool) -> Source:
    path = paths[0]
    if path.is_dir():
        if saved := find_saved(path):
            return Source("saved", str(path), split, saved)
        pairs, notes = find_texts(path, needs_summary)
        if not pairs:
            texts = "NAME.txt with NAME.summary.txt" if needs_summary else "NAME.txt"
            raise ValueError(
                f"{path}: no train.* file and no texts {texts}; the folder has "
                f"{name_some(sorted(item.name for item in path.iterdir())) or 'no files'}"
            )
        return Source("folder", str(path), split, needs_summary=needs_summary, notes=notes)
    for file in paths:
        if not file.exists():
            raise ValueError(f"{file}: no such file")
        _records_reader(file)
    return Source("file", str(path), split, paths)


def _hub_sources(name: str, config_name: str) -> dict[str, Source]:
    try:
        there = get_dataset_split_names(name, config_name or None)
    except Exception as error:
        # The library lists a data set's configurations on several lines.
        text = " ".join(str(error).split())
        flags = f"--dataset {name}" + (f" --dataset_config_name {config_name}" if config_name else "")
        remedy = "; give one with --dataset_config_name" if "onfig name is missing" in text else ""
        raise ValueError(
            f"{flags}: no such file or folder, and no data set could be loaded ({text}){remedy}"
        ) from error
    found: dict[str, str] = {}
    for hub_split in there:
        split = SPLIT_OF_NAME.get(hub_split.lower())
        # The split's own name has precedence over its aliases.
        if split and (split not in found or hub_split == split):
            found[split] = hub_split
    left = [hub_split for hub_split in there if hub_split not in found.values()]
    notes = (f"{name}: splits not read: {name_some(left)}",) if left else ()
    sources = {
        split: Source("hub", name, split, config_name=config_name, hub_split=found[split])
        for split in SPLITS
        if split in found
    }
    return _with_notes(sources, notes)


def _file_records(source: Source, on_bad: OnBad) -> Records:
    for path in source.files:
        yield from read_records(path, on_bad, source.encoding)


def read_records(path: Path, on_bad: OnBad, encoding: str = ENCODING) -> Records:
    """Yield the records of a file with their `file:line`. If `on_bad` returns, an unreadable record is skipped.

    Raises:
        ValueError: The file is empty, unreadable or of an unknown type.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        yield from _records_reader(path)(path, on_bad, encoding)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from error


def _records_reader(path: Path) -> Callable[[Path, OnBad, str], Records]:
    readers: dict[str, Callable[[Path, OnBad, str], Records]] = {
        ".jsonl": jsonl_records,
        ".json": json_records,
        ".csv": csv_records,
        ".tsv": functools.partial(csv_records, delimiter="\t"),
        ".parquet": _parquet_records,
    }
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path}: unknown file type; allowed are .jsonl, .jsonl.gz, .json, .csv, .tsv and .parquet")
    return readers[kind]


def _parquet_records(path: Path, on_bad: OnBad, encoding: str) -> Records:
    file = pyarrow.parquet.ParquetFile(path)
    check_names(file.schema_arrow.names, str(path))
    rows = (batch.slice(row, 1) for batch in file.iter_batches(batch_size=64) for row in range(batch.num_rows))
    for number, row in enumerate(rows, start=1):
        yield from _record_at(f"{path}:{number}", functools.partial(_only_record, row), on_bad)


def _only_record(row: pa.RecordBatch) -> dict[str, Any]:
    return row.to_pylist()[0]


def _record_at(place: str, read: Callable[[], dict[str, Any]], on_bad: OnBad) -> Records:
    """Yield the record that `read` returns. A row with bytes that are not UTF-8 is unreadable."""
    try:
        record = read()
    except ValueError as error:
        on_bad(ValueError(f"{place}: unreadable row ({error})"))
        return
    yield place, record


def _folder_records(source: Source, on_bad: OnBad) -> Records:
    pairs, _ = find_texts(Path(source.place), source.needs_summary)
    for pair in pairs:
        if pair.text is None:
            on_bad(ValueError(f"{pair.summary}: the text {Path(pair.name).name}.txt is missing"))
            continue
        try:
            files = [file for file in (pair.text, pair.summary) if file]
            texts = [read_text(file, source.encoding) for file in files]
        except ValueError as error:
            on_bad(error)
            continue
        yield str(pair.text), {"id": pair.name, **dict(zip(("document", "summary"), texts, strict=False))}


def _saved_records(source: Source, on_bad: OnBad) -> Records:
    try:
        dataset = Dataset.load_from_disk(source.place).with_format(None)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source.place}: unreadable ({error})") from error
    yield from _dataset_records(dataset, source.place, on_bad)


def _hub_records(source: Source, on_bad: OnBad) -> Records:
    dataset = load_dataset(source.place, source.config_name or None, split=source.hub_split)
    yield from _dataset_records(dataset, source.place, on_bad)


def _dataset_records(dataset: Dataset, place: str, on_bad: OnBad) -> Records:
    try:
        for number in range(len(dataset)):
            yield from _record_at(f"{place}[{number}]", functools.partial(dataset.__getitem__, number), on_bad)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{place}: unreadable ({error})") from error
