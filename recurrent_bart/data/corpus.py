"""Tokenised documents, which are tokenised once, cached on disk and memory-mapped during training."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recurrent_bart.data.rows import Columns, Row, refuse
from recurrent_bart.data.sources import Source
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import special_tokens_between
from recurrent_bart.data.tokenizer_identity import tokenizer_identity
from recurrent_bart.data.word_segmenter import (
    WordSegmenter,
    is_segmented,
    n_available_processes,
    segmenter_of,
    segmenter_version,
)
from recurrent_bart.files import atomic_directory, fingerprint

# Increase the version when the format of the cache changes.
CACHE_VERSION = 9
# JSON file with the fields of `Corpus` except `rows`.
ABOUT = "about.json"
# Documents per tokenizer call; a fast tokenizer processes them in parallel threads.
BATCH = 64
# Documents per call if words are segmented, enough for several processes.
SEGMENTED_BATCH = 512
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "record_id": pa.string(),
        "digest": pa.string(),
        "query": pa.list_(pa.int32()),
        "sections": pa.list_(pa.list_(pa.int32())),
        "summaries": pa.list_(pa.list_(pa.int32())),
        "summary_texts": pa.list_(pa.string()),
        "reference_texts": pa.list_(pa.list_(pa.string())),
        "section_lengths": pa.list_(pa.int32()),
        "summary_lengths": pa.list_(pa.int32()),
        "section_indices": pa.list_(pa.int32()),
        "n_sections": pa.int32(),
    }
)


class Corpus(NamedTuple):
    """Tokenised documents of a source.

    The rows have `id`, `record_id` (None: the record has no id), `digest` (hash of the whole text), `query` (ids of the
    question and its separator), `sections` and `summaries` (ids without special tokens), `summary_texts`,
    `reference_texts` (further references), `section_lengths` and `summary_lengths` (tokens), `section_indices` (index
    of each section in the record) and `n_sections` (number of sections of the record).
    `skipped` has the reason for each skipped document. `fingerprint` is a hash of the texts and their order,
    independent of the tokenizer and of references.
    """

    rows: Dataset
    skipped: list[str]
    fingerprint: str


def draw_documents(n_documents: int, most: int | None) -> Sequence[int]:
    """Return the indices of at most `most` documents, drawn with a fixed seed; None: all. A larger number adds some."""
    if most is None or most >= n_documents:
        return range(n_documents)
    drawn = torch.randperm(n_documents, generator=torch.Generator().manual_seed(0))[:most]
    return drawn.sort().values.tolist()


def load_corpus(
    source: Source,
    task: str,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """Load the tokenised documents of a source from the cache. Tokenise and cache missing documents.

    `say` receives a message before a slow operation.

    Raises:
        ValueError: A document is unusable; the message gives its file and line. The cache is unchanged.
    """
    segmenter = segmenter_of(tokenizer)
    versions = [] if segmenter == "none" else [segmenter_version(segmenter)]
    # The cached ids of a question end with the separator, which the tokenizer's identity leaves out.
    separators = [special_tokens_between(tokenizer)] if columns.query else []
    identities = source.identity(), task, vars(columns), tokenizer_identity(tokenizer)
    key = fingerprint(CACHE_VERSION, *identities, *versions, *separators)
    folder = cache_dir / "corpora" / key
    if not folder.exists():
        say(f"tokenising {source.place}, split {source.split!r}")
        with atomic_directory(folder) as draft:
            skipped: list[str] = []

            def skip(error: ValueError) -> None:
                skipped.append(str(error))

            rows = source.rows(task, columns, skip)
            if versions:
                rows = _tell_segmented(rows, segmenter, say)
            on_bad = skip if source.skips_bad else refuse
            texts = write_corpus(rows, tokenizer, draft / "documents.arrow", on_bad)
            (draft / ABOUT).write_text(json.dumps({"skipped": skipped, "fingerprint": texts}))
    return Corpus(Dataset.from_file(str(folder / "documents.arrow")), **json.loads((folder / ABOUT).read_text()))


def _tell_segmented(rows: Iterable[Row], segmenter: str, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the documents. Name the first one whose words have spaces between them already."""
    is_told = False
    for row in rows:
        if not is_told and is_segmented("\n".join(row.sections)):
            is_told = True
            say(
                f"warning: {row.id}: spaces stand between its Japanese words already; {segmenter} keeps these words "
                "and splits them further (--word_segmenter none: texts are read as they are)"
            )
        yield row


def write_corpus(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    on_bad: Callable[[ValueError], None] = refuse,
) -> str:
    """Write tokenised documents to an Arrow file and return a hash of the texts.

    `on_bad` is called for a document without tokens. If it does not raise, the document is skipped.
    """
    rows, encoder, texts = iter(rows), TextEncoder(tokenizer, n_available_processes()), hashlib.sha256()
    n_rows = BATCH if encoder.segmenter is None else SEGMENTED_BATCH
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while batch := list(itertools.islice(rows, n_rows)):
            texts.update(json.dumps([_hashed(row) for row in batch]).encode())
            writer.write_batch(pa.RecordBatch.from_pylist(_tokenise(batch, encoder, on_bad), SCHEMA))
    return texts.hexdigest()[:16]


def _hashed(row: Row) -> list[Any]:
    return [row.sections, row.summaries, *([row.query] if row.query else [])]


def _tokenise(rows: list[Row], encoder: TextEncoder, on_bad: Callable[[ValueError], None]) -> list[dict[str, Any]]:
    ids = iter(encoder([text for row in rows for text in (*row.sections, *row.summaries)]))
    records: list[dict[str, Any]] = []
    for row, query in zip(rows, encoder.queries([row.query for row in rows]), strict=True):
        sections = [next(ids) for _ in row.sections]
        summaries = [next(ids) for _ in row.summaries]
        # a pretraining task has no summaries
        if not any(sections) or (any(row.summaries) and not any(summaries)):
            empty = "summary" if any(sections) else "document"
            on_bad(ValueError(f"{row.id}: the {empty} has no tokens"))
            continue
        targeted = [pair for *pair, text in zip(sections, summaries, row.summaries, strict=True) if text]
        if not all(itertools.chain.from_iterable(targeted)):
            on_bad(ValueError(f"{row.id}: a section with a summary has no tokens, or its summary has none"))
            continue
        records.append(
            {
                "id": row.id,
                "record_id": row.record_id,
                "digest": row.digest(),
                "query": query,
                "sections": sections,
                "summaries": summaries,
                "summary_texts": row.summaries,
                "reference_texts": row.references or [[] for _ in row.summaries],
                "section_lengths": [len(section) for section in sections],
                "summary_lengths": [len(summary) for summary in summaries],
                "section_indices": row.section_indices or list(range(len(sections))),
                "n_sections": row.n_sections or len(sections),
            }
        )
    return records


def texts_of(rows: Iterable[Row], segmenter: str = "none") -> Iterator[str]:
    """Yield all texts of documents, segmented into words by `segmenter`, for the training of a tokenizer."""
    if segmenter == "none":
        for row in rows:
            yield from _texts(row)
        return
    rows, segment = iter(rows), WordSegmenter(segmenter, n_available_processes())
    while batch := list(itertools.islice(rows, SEGMENTED_BATCH)):
        yield from segment([text for row in batch for text in _texts(row)])


def _texts(row: Row) -> list[str]:
    return [*([row.query] if row.query else []), *row.sections, *row.summaries]
