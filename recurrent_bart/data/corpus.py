"""Tokenised documents: made once, kept in a cache, read from disk as they are needed."""

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.rows import Columns, Row, refuse
from recurrent_bart.data.sources import Source
from recurrent_bart.data.text_encoder import TextEncoder

# raised when what is written changes
CACHE_VERSION = 3
# the other fields of a Corpus
ABOUT = "about.json"
# documents tokenised in one call, in parallel by the tokenizer's own threads
BATCH = 64
# arguments of slow tokenizers that change no id of a text
NO_SETTINGS = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "auto_map",
    "backend",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "processor_class",
    "tokenizer_class",
    "truncation_side",
    "trust_remote_code",
}
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


class Corpus(NamedTuple):
    """Tokenised documents of a source.

    Attributes:
        rows: Each with `id`, `sections` and `summaries` (ids without special tokens), `summary_texts`, and in tokens
            `section_lengths` and `summary_lengths`.
        skipped: Why other documents were passed over, if the source passes over any.
        fingerprint: Hash of the texts and their order, whatever the tokenizer.
    """

    rows: Dataset
    skipped: list[str]
    fingerprint: str


def load_corpus(
    source: Source,
    task: str,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """Return the tokenised documents of a source, from the cache or made and put there.

    Args:
        source: Documents of one split.
        task: `"document"` or `"sections"`.
        columns: Which fields of a record are read.
        tokenizer: What makes ids of texts.
        cache_dir: Folder of the cache.
        say: Told before something begins that may take long.

    Raises:
        ValueError: A document is unusable; the message says where it stands. Nothing is left in the cache then.
    """
    key = fingerprint(CACHE_VERSION, source.identity(), task, vars(columns), tokenizer_identity(tokenizer))
    folder = cache_dir / "corpora" / key
    if not folder.exists():
        say(f"tokenising {source.place}, split {source.split!r}")
        with atomic_directory(folder) as draft:
            skipped: list[str] = []

            def skip(error: ValueError) -> None:
                skipped.append(str(error))

            rows = source.rows(task, columns, skip)
            on_bad = skip if source.skips_bad else refuse
            texts = write_corpus(rows, tokenizer, draft / "documents.arrow", on_bad)
            (draft / ABOUT).write_text(json.dumps({"skipped": skipped, "fingerprint": texts}))
    return Corpus(Dataset.from_file(str(folder / "documents.arrow")), **json.loads((folder / ABOUT).read_text()))


def write_corpus(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    on_bad: Callable[[ValueError], None] = refuse,
) -> str:
    """Tokenise documents into an Arrow file, and return a hash of their texts.

    If `on_bad` does not raise, documents without a token are passed over.
    """
    rows, encoder, texts = iter(rows), TextEncoder(tokenizer), hashlib.sha256()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
            texts.update(json.dumps([[row.sections, row.summaries] for row in batch]).encode())
            writer.write_batch(pa.RecordBatch.from_pylist(_tokenise(batch, encoder, on_bad), SCHEMA))
    return texts.hexdigest()[:16]


def _tokenise(rows: list[Row], encoder: TextEncoder, on_bad: Callable[[ValueError], None]) -> list[dict[str, Any]]:
    ids = iter(encoder([text for row in rows for text in (*row.sections, *row.summaries)]))
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


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which ids a text becomes, wherever the tokenizer's files are."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return fingerprint(tokenizer.backend_tokenizer.to_str())
    # files of vocabularies, by what they hold
    files = [str(tokenizer.init_kwargs.get(name)) for name in sorted(tokenizer.vocab_files_names)]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()]
    settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if _is_setting(name, value)}
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    vocabulary = sorted(tokenizer.get_vocab().items())
    return fingerprint(type(tokenizer).__name__, vocabulary, sorted(settings.items()), added, hashes)


def _is_setting(name: str, value: Any) -> bool:
    """Return True if an argument of a slow tokenizer decides ids, and is not where it was loaded from, or a token."""
    is_path = name.endswith(("_file", "_path")) or (isinstance(value, str) and Path(value).is_absolute())
    return value is not None and not is_path and name not in NO_SETTINGS and not name.endswith("_token")


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-like values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def atomic_directory(folder: Path, replaces: bool = False) -> Iterator[Path]:
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
