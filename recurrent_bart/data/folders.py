"""Search of a data set's folder for the files of each split, or for texts with their summaries."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Folder and file names that mean a split, in lower case; upper case is accepted too.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
SPLIT_OF_NAME = {name: split for split, names in SPLIT_NAMES.items() for name in names}
# Examples: train, train_2, train-00000-of-00002.
SPLIT_STEM = re.compile(rf"(?i)({'|'.join(SPLIT_OF_NAME)})(?:[-_ ]?(\d+)(?:-of-(\d+))?)?")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT = re.compile(r"(?i)(.+?)(\.summary)?\.txt")
# Files that describe a data set.
ABOUT = re.compile(r"(?i)(readme|licen[cs]e|citation|dataset_(infos?|dict)\b).*")
# Files that the library `datasets` writes into the folder of a data set, and into the folder of several splits.
SAVED = ("state.json", "dataset_info.json")
SAVED_SPLITS = "dataset_dict.json"
# Maximum number of file names in a message.
N_NAMED = 5


def kind_of(path: Path) -> str | None:
    """Return the file type as a lower-case suffix, or None if no reader supports the file."""
    name = path.name.lower()
    if name.endswith(".jsonl.gz"):
        return ".jsonl"
    return path.suffix.lower() if path.suffix.lower() in SUFFIXES else None


@dataclass(frozen=True)
class SplitPath:
    """File or folder whose name, in lower case, names a split.

    `number` and `total` come from names like train-00000-of-00002; `number` is -1 if the name has none.
    """

    path: Path
    name: str
    number: int
    total: int | None

    @classmethod
    def parse(cls, path: Path) -> "SplitPath | None":
        """Parse a file name. Return None if it names no split or if no reader supports the file."""
        stem = SPLIT_STEM.fullmatch(path.name.split(".")[0])
        if stem is None or not (path.is_dir() or kind_of(path)):
            return None
        return cls(path, stem[1].lower(), int(stem[2] or -1), int(stem[3]) if stem[3] else None)


def find_splits(folder: Path) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """Find the paths of each split by number, with a note per ignored file. Raise ValueError for ambiguous files."""
    found: dict[str, list[SplitPath]] = {}
    left = []
    for path in sorted(folder.iterdir()):
        part = SplitPath.parse(path)
        if part:
            found.setdefault(SPLIT_OF_NAME[part.name], []).append(part)
        else:
            left.append(path)
    for split, parts in found.items():
        parts.sort(key=lambda part: part.number)
        _check_parts(folder, split, parts)
    return {split: tuple(part.path for part in parts) for split, parts in found.items()}, tuple(_not_read(folder, left))


def _check_parts(folder: Path, split: str, parts: list[SplitPath]) -> None:
    files = ", ".join(part.path.name for part in parts)
    has_folder = any(part.path.is_dir() for part in parts)
    kinds = {(part.name, kind_of(part.path), part.total) for part in parts}
    if len(parts) > 1 and (has_folder or len(kinds) > 1 or len({part.number for part in parts}) < len(parts)):
        raise ValueError(
            f"{folder}: the files of split {split!r} may be copies of each other: {files}; keep one of them, or number "
            f"files of one type: {split}_1.jsonl, {split}_2.jsonl"
        )
    if parts[0].total not in (None, len(parts)):
        raise ValueError(f"{folder}: split {split!r} has only {len(parts)} of {parts[0].total} files: {files}")


def _not_read(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    names = [path.name for path in paths if not path.name.startswith(".") and not ABOUT.fullmatch(path.name)]
    if names:
        yield f"{folder}: not read: {name_some(names)}"


def name_some(names: list[str]) -> str:
    """Join the first `N_NAMED` names into a text that ends with the number of the remaining names."""
    more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + more


def find_saved(folder: Path) -> tuple[Path, ...]:
    """Return the files of a data set that `save_to_disk` of the library `datasets` wrote; empty for another folder.

    Raises:
        ValueError: The folder holds several splits.
    """
    if (folder / SAVED_SPLITS).exists():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise ValueError(f"{folder}: a data set with the splits {name_some(names)}; give the folder of one split")
    if not all((folder / name).exists() for name in SAVED):
        return ()
    # Files named cache-* hold results of `map` and `filter` that are not part of the data set.
    arrow = [path for path in folder.glob("*.arrow") if not path.name.startswith("cache-")]
    return (folder / SAVED[0], *sorted(arrow))


@dataclass(frozen=True)
class TextPair:
    """File of a text and file of its summary. Each is None if its file is missing."""

    name: str
    summary: Path | None
    text: Path | None


def find_texts(folder: Path, needs_summary: bool = True) -> tuple[list[TextPair], tuple[str, ...]]:
    """Find all texts in a folder and its subfolders that have a summary, and a note for each ignored file.

    Symbolic links to folders are followed; each folder is read once. Without `needs_summary`, find all texts.
    """
    texts: dict[str, Path] = {}
    summaries: dict[str, Path] = {}
    others = []
    for path in _files(folder):
        name = str(path.relative_to(folder))
        match = TEXT.fullmatch(name)
        known = (summaries if match[2] else texts) if match else None
        if match and known is not None and match[1] not in known:
            known[match[1]] = path
        elif not path.name.startswith("."):
            others.append(name)
    if not needs_summary:
        lone = [TextPair(name, None, path) for name, path in sorted(texts.items())]
        return lone, tuple(_left_out(folder, [], others))
    pairs = [TextPair(name, path, texts.get(name)) for name, path in sorted(summaries.items())]
    return pairs, tuple(_left_out(folder, sorted(texts.keys() - summaries.keys()), sorted(others)))


def _left_out(folder: Path, without_summary: list[str], others: list[str]) -> Iterator[str]:
    if without_summary:
        yield f"{folder}: not read: {len(without_summary)} texts without a summary: {name_some(without_summary)}"
    if others:
        yield f"{folder}: not read: {name_some(others)}"


def _files(folder: Path) -> Iterator[Path]:
    seen = set()
    for root, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders.sort()
        yield from (Path(root, name) for name in sorted(files))


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
