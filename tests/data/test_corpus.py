"""Cache of tokenised documents: complete or absent, and rebuilt after a change of its inputs."""

import json
import multiprocessing
import os
from dataclasses import dataclass, fields, replace

import pytest

from recurrent_bart.data import corpus as module
from recurrent_bart.data.corpus import load_corpus, texts_of, write_corpus
from recurrent_bart.data.rows import Columns, Row
from recurrent_bart.data.sources import find_sources
from recurrent_bart.data.tokenizer import train_tokenizer

RECORDS = [
    {"id": "a", "document": "one two three", "summary": "numbers", "other": "else"},
    {"id": "b", "document": "four five", "summary": "more numbers", "other": "else"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([record["document"] for record in RECORDS] * 20, vocab_size=300)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "documents.jsonl", RECORDS)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path, tokenizer, cache, task="document", columns=None):
    sources = find_sources("stdlib", train_file=str(path), validation_file=str(path))
    return load_corpus(sources["train"], task, columns or Columns(), tokenizer, cache)[0]


def entries(cache):
    return sorted(path.name for path in (cache / "corpora").iterdir())


def test_documents_hold_ids_without_special_tokens_and_lengths(path, tokenizer, tmp_path):
    corpus = load(path, tokenizer, tmp_path)
    assert corpus["id"] == ["a", "b"]
    row = corpus[0]
    assert tokenizer.decode(row["sections"][0]) == "one two three"
    assert tokenizer.decode(row["summaries"][0]) == row["summary_texts"][0] == "numbers"
    assert not set(tokenizer.all_special_ids) & {*row["sections"][0], *row["summaries"][0]}
    assert row["section_lengths"] == [len(row["sections"][0])]
    assert row["summary_lengths"] == [len(row["summaries"][0])]


def test_further_references_are_kept_as_texts(tokenizer, tmp_path):
    records = [RECORDS[0] | {"more": ["three numbers", "digits"]}, RECORDS[1] | {"more": []}]
    path = write(tmp_path / "documents.jsonl", records)
    corpus = load(path, tokenizer, tmp_path, columns=Columns(references="more"))
    assert corpus["reference_texts"] == [[["three numbers", "digits"]], [[]]]
    assert load(path, tokenizer, tmp_path)["reference_texts"] == [[[]], [[]]]


def test_sections_keep_their_targets(tokenizer, tmp_path):
    record = {"sections": ["one two", "three", "four"], "summaries": ["first", "", "last"]}
    corpus = load(write(tmp_path / "s.jsonl", [record]), tokenizer, tmp_path, task="sections")
    row = corpus[0]
    assert [tokenizer.decode(ids) for ids in row["sections"]] == record["sections"]
    assert row["summary_texts"] == ["first", "", "last"]
    assert row["summary_lengths"][1] == 0
    assert (row["section_indices"], row["n_sections"]) == ([0, 1, 2], 3)


def test_sections_keep_their_position_in_the_record(tokenizer, tmp_path):
    record = {"sections": ["one", "two", "three", "four", "five"], "summaries": ["", "", "", "last", ""]}
    path = write(tmp_path / "s.jsonl", [RECORDS[0] | record])
    row = load(path, tokenizer, tmp_path, task="sections")[0]
    assert (row["summary_texts"], row["section_indices"], row["n_sections"]) == (["", "last"], [0, 3], 5)
    row = load(path, tokenizer, tmp_path)[0]
    assert (row["section_indices"], row["n_sections"]) == ([0], 1)


def test_rows_keep_their_record_and_the_hash_of_the_whole_text(tokenizer, tmp_path):
    """The second record has the text of the first, with more white space, and no id."""
    records = [RECORDS[0], {"document": " one  two\nthree", "summary": "numbers"}, RECORDS[1]]
    corpus = load(write(tmp_path / "documents.jsonl", records), tokenizer, tmp_path)
    assert corpus["record_id"] == ["a", None, "b"]
    first, second, third = corpus["digest"]
    assert first == second != third


def test_cached_documents_are_not_tokenised_again(path, tokenizer, tmp_path, monkeypatch):
    first = load(path, tokenizer, tmp_path).to_list()
    monkeypatch.setattr(module, "write_corpus", lambda *_: pytest.fail("tokenised again"))
    assert load(path, tokenizer, tmp_path).to_list() == first


def test_other_documents_tokenizer_task_or_columns_make_a_new_cache_entry(path, tokenizer, tmp_path):
    both = [record | {"sections": [record["document"]], "summaries": [record["summary"]]} for record in RECORDS]
    write(path, both)
    load(path, tokenizer, tmp_path)
    load(path, tokenizer, tmp_path, task="sections")
    load(path, tokenizer, tmp_path, columns=Columns(text="other"))
    load(path, train_tokenizer(["one two"] * 20, vocab_size=280), tmp_path)
    assert len(entries(tmp_path)) == 4
    write(path, both[:1])
    assert len(load(path, tokenizer, tmp_path)) == 1
    assert len(entries(tmp_path)) == 5


def test_each_part_of_the_key_makes_another_entry_of_the_cache(tokenizer, tmp_path, monkeypatch):
    source = FixedSource("one")
    given = {"source": source, "task": "document", "columns": Columns(), "tokenizer": tokenizer, "cache_dir": tmp_path}
    assert given["columns"] == Columns("document", "summary", "sections", "summaries", None)
    load_corpus(**given)
    load_corpus(**given)
    assert len(entries(tmp_path)) == 1
    changes = [{"source": FixedSource("other")}, {"task": "sections"}]
    changes += [{"columns": replace(Columns(), **{item.name: "other"})} for item in fields(Columns)]
    for number, change in enumerate(changes, 2):
        load_corpus(**given | change)
        assert len(entries(tmp_path)) == number, change
    monkeypatch.setattr(module, "CACHE_VERSION", module.CACHE_VERSION + 1)
    load_corpus(**given)
    assert len(entries(tmp_path)) == len(changes) + 2


@dataclass
class FixedSource:
    """Source of one document, whose identity is a name."""

    name: str
    place, split, skips_bad = "here", "train", False

    def identity(self):
        return [self.name]

    def rows(self, task, columns, on_skip):
        yield Row("a", ["one two"], ["numbers"])


def test_the_hash_of_the_texts_is_that_of_texts_and_order_alone(tokenizer, tmp_path):
    def texts_hash(rows, number, used=tokenizer):
        return write_corpus(rows, used, tmp_path / str(number))

    rows = [Row("a", ["one two"], ["x"]), Row("b", ["three"], ["y"])]
    first = texts_hash(rows, 0)
    assert texts_hash([replace(row, id="other") for row in rows], 1) == first
    assert texts_hash(rows, 2, SilentTokenizer()) == first
    others = [rows[::-1], [rows[0], replace(rows[1], sections=["four"])], [rows[0], replace(rows[1], summaries=["z"])]]
    assert len({first, *(texts_hash(other, number) for number, other in enumerate(others, 3))}) == 4


def test_a_file_of_the_same_size_but_newer_is_read_again(path, tokenizer, tmp_path):
    load(path, tokenizer, tmp_path)
    write(path, [RECORDS[0] | {"document": "six five four"[:13]}, RECORDS[1]])
    os.utime(path, ns=(0, 10**18))
    assert tokenizer.decode(load(path, tokenizer, tmp_path)[0]["sections"][0]) == "six five four"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"document": "text"}, r"documents.jsonl:3: no column 'summary'"),
        ({"document": "\u200b\u00ad", "summary": "s"}, r"documents.jsonl:3: the document has no tokens"),
        ({"document": "text", "summary": "\u200b"}, r"documents.jsonl:3: the summary has no tokens"),
    ],
)
def test_an_unusable_document_is_refused_and_leaves_no_cache_entry(path, tmp_path, record, message):
    tokenizer = SilentTokenizer()
    write(path, [*RECORDS, record])
    with pytest.raises(ValueError, match=message):
        load(path, tokenizer, tmp_path)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    "bad",
    [{"sections": ["a", "\u200b"], "summaries": ["s", "t"]}, {"sections": ["a", "b"], "summaries": ["s", "\u200b"]}],
)
def test_a_section_whose_text_or_target_has_no_tokens_is_refused_or_skipped(tmp_path, bad):
    good = {"sections": ["\u200b", "b"], "summaries": ["", "t"]}
    source = find_sources(str(write(tmp_path / "a.jsonl", [good, bad, good])))["train"]
    source = replace(source, held_out=None)
    with pytest.raises(ValueError, match=r"a.jsonl:2: a section with a summary has no tokens"):
        load_corpus(source, "sections", Columns(), SilentTokenizer(), tmp_path)
    rows, skipped, _ = load_corpus(replace(source, skips_bad=True), "sections", Columns(), SilentTokenizer(), tmp_path)
    assert (len(rows), len(skipped)) == (2, 1)


class SilentTokenizer:
    """Slow tokenizer with an id for each word and no tokens for unprintable characters."""

    unk_token_id = mask_token_id = None
    all_special_ids = all_special_tokens = ()
    init_kwargs, vocab_files_names, added_tokens_decoder = {}, {}, {}

    def __call__(self, texts, **_):
        return {"input_ids": [[len(word) for word in text.split() if word.isprintable()] for text in texts]}

    def get_vocab(self):
        return {"word": 0}


def test_many_documents_are_tokenised_in_one_call(tokenizer, tmp_path):
    """A tokenizer encodes the texts of one call in parallel threads; with one text per call, it uses one thread."""
    sizes = []

    class Counting(SilentTokenizer):
        def __call__(self, texts, **_):
            sizes.append(len(texts))
            return super().__call__(texts)

    path = write(tmp_path / "many.jsonl", RECORDS * 100)
    assert len(load(path, Counting(), tmp_path)) == 200
    assert sizes == [128, 128, 128, 16]


def _load_in_process(path, cache, barrier, results):
    tokenizer = SilentTokenizer()
    write_corpus = module.write_corpus

    def wait(*arguments):
        write_corpus(*arguments)
        # Both processes have written their folder, and none has renamed it.
        barrier.wait(timeout=60)

    module.write_corpus = wait
    results.put(load(path, tokenizer, cache)["id"][:])


def test_two_processes_may_tokenise_the_same_documents_at_once(path, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_load_in_process, args=(path, tmp_path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [["a", "b"]] * 2
    assert len(entries(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_refused(path, tokenizer, tmp_path):
    """A file in the way stops every user; missing permissions do not stop root."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cache/corpora: cannot be written \(Not a directory\)"):
        load(path, tokenizer, tmp_path / "cache")


def test_texts_of_documents_are_their_sections_and_targets():
    assert list(texts_of([Row("a", ["s", "t"], ["u", ""]), Row("b", ["v"], ["w"])])) == [*"stu", "", *"vw"]
