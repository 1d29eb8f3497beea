"""Where documents come from: the embedded corpus, files, folders of texts, data sets by name."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import get_dataset_split_names, load_dataset, load_dataset_builder

from recurrent_bart.data.gap_sentences import made_rows
from recurrent_bart.data.jsonl import ENCODING, jsonl_records
from recurrent_bart.data.rows import SPLITS, Columns, Row, make_row, refuse, split_of
from recurrent_bart.data.stdlib import library_root, stdlib_rows

EMBEDDED = "stdlib"
SUMMARY_SUFFIX = ".summary.txt"


@dataclass(frozen=True)
class Source:
    """Documents of one split.

    Attributes:
        kind: `"stdlib"`, `"file"`, `"folder"` or `"hub"`.
        place: File, folder, or name of a data set.
        split: Which of `SPLITS` this is.
        held_out: The place has training documents alone; whether one is held out is found from its name.
        skips_bad: Pass over documents that are unusable.
        n_made: Rows behind each document that are made of its own sentences.
    """

    kind: str
    place: str
    split: str
    held_out: bool = False
    skips_bad: bool = False
    n_made: int = 0

    def identity(self) -> list[Any]:
        """What changes when the documents do, as far as that can be seen without reading them."""
        if self.kind == "hub":
            builder = load_dataset_builder(self.place)
            return [self.kind, self.place, self.split, str(builder.info.version), builder.hash, *self._choices()]
        if self.kind == "file":
            files = [Path(self.place)]
        else:
            files = sorted(Path(self.place).rglob("*.py" if self.kind == EMBEDDED else "*.txt"))
        stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return [self.kind, self.split, self.held_out, stamps, *self._choices()]

    def _choices(self) -> list[Any]:
        return [self.skips_bad, self.n_made]

    def rows(
        self, task: str, columns: Columns, on_skip: Callable[[ValueError], None] = lambda error: None
    ) -> Iterator[Row]:
        """The documents in order.

        Args:
            task: `"document"` or `"sections"`.
            columns: Which fields of a record are read.
            on_skip: Told of those that are passed over, where that is wanted.

        Raises:
            ValueError: A record is unreadable or has no text or no target, or there is none; the message gives the
                file and line.
        """
        is_empty = True
        for row in self._all_rows(task, columns, on_skip if self.skips_bad else refuse):
            if self.held_out and _held_out_split(row) != self.split:
                continue
            is_empty = False
            yield row
            if self.n_made:
                yield from made_rows(row, self.n_made, task)
        if is_empty:
            raise ValueError(f"{self.place}: no documents with a target for --task {task} in split {self.split!r}")

    def _all_rows(self, task: str, columns: Columns, on_bad: Callable[[ValueError], None]) -> Iterator[Row]:
        if self.kind == EMBEDDED:
            yield from stdlib_rows(self.split, task)
            return
        readers = {"file": _file_records, "folder": _folder_records, "hub": _hub_records}
        for place, record in readers[self.kind](self, on_bad):
            try:
                row = make_row(record, task, columns, place)
            except ValueError as error:
                on_bad(error)
                continue
            yield row


def find_sources(
    dataset: str, train_file: str | None = None, validation_file: str | None = None, test_file: str | None = None
) -> dict[str, Source]:
    """The sources of each split that there is.

    A data set without a validation split has one held out, by a hash of each document's name.

    Args:
        dataset: `"stdlib"`; a file; a folder with files or folders of texts named `train.*`, `validation.*`, `test.*`;
            a folder of texts; or the name of a data set that `datasets` loads.
        train_file: A file or folder of texts; it and the next two stand instead of `dataset`.
        validation_file: Likewise.
        test_file: Likewise.

    Raises:
        ValueError: A file does not exist or is of no known kind, or there are no training documents.
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    if any(given.values()):
        sources = {split: _path_source(Path(path), split) for split, path in given.items() if path}
    elif dataset == EMBEDDED:
        return {split: Source(EMBEDDED, str(library_root()), split) for split in SPLITS}
    elif Path(dataset).exists():
        sources = _sources_at(Path(dataset))
    elif dataset.startswith((".", "/", "~")) or Path(dataset).suffix:
        raise ValueError(f"{dataset}: no such file or folder")
    else:
        sources = _hub_sources(dataset)
    if "train" in sources and "validation" not in sources:
        whole = sources["train"]
        sources |= {s: Source(whole.kind, whole.place, s, held_out=True) for s in ("train", "validation")}
    return sources


def _held_out_split(row: Row) -> str:
    split = split_of(row.id)
    return "train" if split == "test" else split


def _sources_at(place: Path) -> dict[str, Source]:
    if place.is_file():
        return {"train": _path_source(place, "train")}
    found = {}
    for split in SPLITS:
        matches = [path for path in sorted(place.glob(f"{split}*")) if path.name.split(".")[0] == split]
        if len(matches) > 1:
            raise ValueError(f"{place}: more than one place for split {split!r}: {', '.join(p.name for p in matches)}")
        if matches:
            found[split] = _path_source(matches[0], split)
    return found or {"train": _path_source(place, "train")}


def _path_source(path: Path, split: str) -> Source:
    if path.is_dir():
        if not any(path.rglob(f"*{SUMMARY_SUFFIX}")):
            raise ValueError(f"{path}: no train.* file and no texts NAME.txt with NAME{SUMMARY_SUFFIX}")
        return Source("folder", str(path), split)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    _records_reader(path)
    return Source("file", str(path), split)


def _hub_sources(name: str) -> dict[str, Source]:
    try:
        splits = get_dataset_split_names(name)
    except Exception as error:
        raise ValueError(f"--dataset {name}: neither a file or folder nor a data set that loads ({error})") from error
    return {split: Source("hub", name, split) for split in SPLITS if split in splits}


def _file_records(source: Source, on_bad: Callable[[ValueError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source.place)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        read = _records_reader(path)
        yield from read(path, on_bad) if read is jsonl_records else read(path)
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from error


def _records_reader(path: Path) -> Any:
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    readers = {".jsonl": jsonl_records, ".json": jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}
    if not suffixes or suffixes[0] not in readers or (path.suffix == ".gz" and suffixes[0] != ".jsonl"):
        raise ValueError(f"{path}: unknown kind of file; known are .jsonl, .jsonl.gz, .csv and .parquet")
    return readers[suffixes[0]]


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding=ENCODING, newline="") as file:
        reader = csv.DictReader(file)
        for record in reader:
            yield f"{path}:{reader.line_num}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", record


def _folder_records(source: Source, on_bad: Callable[[ValueError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    for summary in sorted(Path(source.place).rglob(f"*{SUMMARY_SUFFIX}")):
        text = summary.with_name(summary.name.removesuffix(SUMMARY_SUFFIX) + ".txt")
        if not text.exists():
            on_bad(ValueError(f"{summary}: there is no text {text.name} beside it"))
            continue
        name = str(text.relative_to(source.place).with_suffix(""))
        try:
            document, target = text.read_text(ENCODING), summary.read_text(ENCODING)
        except UnicodeDecodeError as error:
            on_bad(ValueError(f"{text}: unreadable, or its summary ({error})"))
            continue
        yield str(text), {"id": name, "document": document, "summary": target}


def _hub_records(source: Source, on_bad: Callable[[ValueError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    split = "train" if source.held_out else source.split
    for number, record in enumerate(load_dataset(source.place, split=split)):
        yield f"{source.place}[{number}]", record
