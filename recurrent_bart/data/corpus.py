"""Tokenised documents: made once, kept in a cache, read from disk as they are needed."""

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.rows import Columns, Row, refuse
from recurrent_bart.data.sources import Source

# raised when what is written changes
CACHE_VERSION = 2
# why documents were passed over
SKIPPED = "skipped.json"
# documents tokenised in one call, in parallel by the tokenizer's own threads
BATCH = 64
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "sections": pa.list_(pa.list_(pa.int32())),
        "summaries": pa.list_(pa.list_(pa.int32())),
        "summary_texts": pa.list_(pa.string()),
        "section_lengths": pa.list_(pa.int32()),
        "summary_lengths": pa.list_(pa.int32()),
    }
)


def load_corpus(
    source: Source,
    task: str,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Dataset, list[str]]:
    """The tokenised documents of a source, from the cache or made and put there.

    Args:
        source: Documents of one split.
        task: `"document"` or `"sections"`.
        columns: Which fields of a record are read.
        tokenizer: What makes ids of texts.
        cache_dir: Folder of the cache.
        say: Told before something begins that may take long.

    Returns:
        Rows with `id`, `sections` and `summaries` (ids without special tokens), `summary_texts`, and in tokens
        `section_lengths` and `summary_lengths`; and why others were passed over, where the source asks for that.

    Raises:
        ValueError: A document is unusable; the message says where it stands. Nothing is left in the cache then.
    """
    key = fingerprint(CACHE_VERSION, source.identity(), task, vars(columns), tokenizer_identity(tokenizer))
    folder = cache_dir / "corpora" / key
    if not folder.exists():
        say(f"tokenising {source.place}, split {source.split!r}")
        with half_written(folder) as draft:
            skipped: list[str] = []

            def skip(error: ValueError) -> None:
                skipped.append(str(error))

            rows = source.rows(task, columns, skip)
            write_corpus(rows, tokenizer, draft / "documents.arrow", skip if source.skips_bad else refuse)
            (draft / SKIPPED).write_text(json.dumps(skipped))
    return Dataset.from_file(str(folder / "documents.arrow")), json.loads((folder / SKIPPED).read_text())


def write_corpus(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    on_bad: Callable[[ValueError], None] = refuse,
) -> None:
    """Tokenise documents into an Arrow file; unless `on_bad` raises, those without a token are passed over."""
    rows = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(_tokenise(batch, tokenizer, on_bad), SCHEMA))


def _tokenise(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, on_bad: Callable[[ValueError], None]
) -> list[dict[str, Any]]:
    ids = iter(_encode([text for row in rows for text in (*row.sections, *row.summaries)], tokenizer))
    records = []
    for row in rows:
        sections = [next(ids) for _ in row.sections]
        summaries = [next(ids) for _ in row.summaries]
        if not any(sections) or not any(summaries):
            what = "no target, the summary has" if any(sections) else "a document of"
            on_bad(ValueError(f"{row.id}: {what} 0 tokens"))
            continue
        records.append(
            {
                "id": row.id,
                "sections": sections,
                "summaries": summaries,
                "summary_texts": row.summaries,
                "section_lengths": [len(section) for section in sections],
                "summary_lengths": [len(summary) for summary in summaries],
            }
        )
    return records


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose: a document longer than the position table is no mistake here
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides which ids a text becomes."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return fingerprint(tokenizer.backend_tokenizer.to_str())
    return fingerprint(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def half_written(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """Give a folder to write into, which appears under its name only when it is complete.

    Args:
        folder: Its name. Of several processes that write the same one, the last to end is dropped.
        replaces: What stands under the name already makes way instead.

    Raises:
        ValueError: The place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ValueError(f"{folder.parent}: cannot be written ({error.strerror})") from error
    old = draft.with_name(draft.name + ".old")
    try:
        yield draft
        # mkdtemp lets nobody else read
        draft.chmod(0o755)
        if replaces and folder.exists():
            folder.rename(old)
        _rename_unless_there(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _rename_unless_there(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        # another process was first, or the place is lost
        if not folder.is_dir():
            raise


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """All texts of documents, for training a tokenizer."""
    for row in rows:
        yield from row.sections
        yield from row.summaries
