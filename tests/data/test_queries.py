"""A question stands before every segment, with exactly the ids that the tokenizer gives to a question and a text."""

import gzip
import json
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import BertJapaneseTokenizer, MBart50Tokenizer, MBartTokenizer

from recurrent_bart.data.batches import Collator, SegmentSizes, check_query, plan_documents
from recurrent_bart.data.corpus import load_corpus
from recurrent_bart.data.held_out import SPLIT_RULES, HeldOut
from recurrent_bart.data.rows import Columns, read_query, split_queries
from recurrent_bart.data.sources import find_sources
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import special_tokens_around, special_tokens_between, train_tokenizer
from tiny import multilingual_tokenizer

QUERY, TEXT = "a bed", "bead dab cab ace face bad deaf cafe fade bede dad"
COLUMNS = Columns(query="query")


def unigram():
    return train_tokenizer([TEXT, QUERY] * 5, vocab_size=300)


def barts():
    """Return a tokenizer with BART's two separators between texts."""
    tokenizer = unigram()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def japanese_bert(folder):
    """Return a tokenizer without bos and eos."""
    (folder / "vocab.txt").write_text(
        "\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"abcdef", *map("##{}".format, "abcdef")])
    )
    return BertJapaneseTokenizer(str(folder / "vocab.txt"), word_tokenizer_type="basic")


MAKERS = {
    "unigram": lambda folder: unigram(),
    "BART": lambda folder: barts(),
    "BertJapanese": japanese_bert,
    "MBart": lambda folder: multilingual_tokenizer(MBartTokenizer, [TEXT], src_lang="en_XX", tgt_lang="ja_XX"),
    "MBart-50": lambda folder: multilingual_tokenizer(MBart50Tokenizer, [TEXT], src_lang="en_XX", tgt_lang="ja_XX"),
}


@pytest.fixture(params=MAKERS)
def tokenizer(request, tmp_path):
    return MAKERS[request.param](tmp_path)


@pytest.fixture
def corpus(tokenizer, tmp_path):
    """Return tokenised documents with one section, with a question and without."""
    rows = [{"document": TEXT, "summary": "a cab", "query": query} for query in (QUERY, None, " ")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = find_sources(str(tmp_path), train_file=str(tmp_path / "train.jsonl"))["train"]
    return load_corpus(replace_held_out(source), "document", COLUMNS, tokenizer, tmp_path / "cache").rows


def replace_held_out(source):
    return replace(source, held_out=None)


def collator(tokenizer, segment_size, overlap=0):
    sizes = SegmentSizes(segment_size, segment_size + overlap, -1)
    return Collator("document", sizes, *special_tokens_around(tokenizer), 1, 16)


def test_a_document_in_one_segment_has_the_ids_of_the_tokenizers_pair(tokenizer, corpus):
    ((segment,), _), ((alone,), _), ((blank,), _) = (collator(tokenizer, 200).segments(row) for row in corpus)
    assert alone == blank == tokenizer(TEXT)["input_ids"]
    between = special_tokens_between(tokenizer)
    leading, trailing = special_tokens_around(tokenizer)
    query, text = (tokenizer(it, add_special_tokens=False)["input_ids"] for it in (QUERY, TEXT))
    assert segment == [*leading, *query, *between, *text, *trailing]
    if type(tokenizer) in (MBartTokenizer, MBart50Tokenizer):
        assert between == [tokenizer.eos_token_id]
    else:
        assert segment == tokenizer(QUERY, TEXT)["input_ids"]
        assert len(between) == (2 if tokenizer(QUERY, TEXT)["input_ids"].count(2) == 3 else 1)


@pytest.mark.parametrize("overlap", [0, 3])
def test_the_question_stands_before_every_segment(tokenizer, corpus, overlap):
    leading, trailing = special_tokens_around(tokenizer)
    query = [*leading, *TextEncoder(tokenizer).queries([QUERY])[0]]
    room = 4
    size = len(query) + room + len(trailing)
    segments, _ = collator(tokenizer, size, overlap).segments(corpus[0])
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    starts = range(0, len(text), room)
    assert segments == [[*query, *text[max(0, at - overlap) : at + room], *trailing] for at in starts]
    lengths = corpus["section_lengths"], corpus["summary_lengths"]
    n_special, queries = len(leading) + len(trailing), [len(ids) for ids in corpus["query"]]
    plan = plan_documents(*lengths, SegmentSizes(size, size + overlap, -1), n_special, query_lengths=queries)
    documents = [collator(tokenizer, size, overlap).segments(row)[0] for row in corpus]
    assert plan.n_segments == [len(document) for document in documents]
    assert len(documents[1]) < len(documents[0])


def test_a_question_without_room_for_text_is_refused():
    check_query(5, 6, 8, "document 'a'")
    with pytest.raises(ValueError, match=r"^document 'a': the query has 6 tokens .* segments of 8 tokens \(--segment_"):
        check_query(6, 6, 8, "document 'a'")


def test_a_list_of_questions_gives_a_document_each_and_keeps_them_in_one_split(tmp_path):
    texts = [f"{TEXT} {number}" for number in range(20)]
    questions = [{"query": "why", "summary": "A"}, {"query": "", "summary": " "}, {"query": "how", "summary": "B"}]
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.writelines(
            json.dumps({"id": f"m{n}", "document": t, "query": questions}) + "\n" for n, t in enumerate(texts)
        )
    sources, skipped = find_sources(str(tmp_path / "m.jsonl.gz")), []
    with pytest.raises(ValueError, match=r"m\.jsonl\.gz:1: the summary is empty"):
        list(sources["train"].rows("document", COLUMNS))
    found = {
        split: list(replace(sources[split], skips_bad=True).rows("document", COLUMNS, skipped.append))
        for split in ("train", "validation")
    }
    assert [(row.id, row.query, row.summaries) for row in found["train"]][:2] == [
        (f"{found['train'][0].record_id} (query 1)", "why", ["A"]),
        (f"{found['train'][0].record_id} (query 3)", "how", ["B"]),
    ]
    assert {len(rows) % 2 for rows in found.values()} == {0}
    assert sum(map(len, found.values())) == 40
    assert not {row.record_id for row in found["train"]} & {row.group for row in found["validation"]}


def test_the_question_is_part_of_the_documents_fingerprint_and_cache(tmp_path):
    def loaded(query, columns=COLUMNS):
        (tmp_path / "train.jsonl").write_text(json.dumps({"document": TEXT, "summary": "a", "query": query}))
        source = replace_held_out(find_sources(str(tmp_path / "train.jsonl"))["train"])
        return load_corpus(source, "document", columns, unigram(), tmp_path / "cache")

    plain = loaded("a bed", Columns())
    assert plain.rows["query"] == [[]]
    assert loaded(None).fingerprint == plain.fingerprint
    fingerprints = {loaded(query).fingerprint for query in ("a bed", "a cab", None)}
    assert len(fingerprints) == 3


def write_meetings(path, n_records, named=True, **more):
    """Write records with eight questions each."""
    questions = [{"query": f"why {number}", "summary": f"A {number}"} for number in range(8)]
    records = [{"document": f"{TEXT} {n}", "query": questions, **more} for n in range(n_records)]
    records = [{"id": f"m{n}", **record} if named else record for n, record in enumerate(records)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_every_rule_keeps_all_questions_about_a_text_in_one_split(rule, named, tmp_path):
    sources = find_sources(str(write_meetings(tmp_path / "m.jsonl", 20, named)), held_out=HeldOut(0.3, rule))
    found = {split: list(sources[split].rows("document", COLUMNS)) for split in ("train", "validation")}
    texts = {split: {row.sections[0] for row in rows} for split, rows in found.items()}
    assert texts["validation"]
    assert not texts["train"] & texts["validation"]
    assert {split: len(rows) for split, rows in found.items()} == {split: 8 * len(own) for split, own in texts.items()}
    # a record's id decides, as without a list of questions
    write_meetings(tmp_path / "m.jsonl", 20, named)
    plain = find_sources(str(tmp_path / "m.jsonl"), held_out=HeldOut(0.3, rule))["validation"]
    records = [json.loads(line) | {"summary": "A"} for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert {row.sections[0] for row in plain.rows("document", Columns())} == texts["validation"]


def test_gap_sentences_are_made_once_of_a_record(tmp_path):
    sentences = " ".join(f"the pump {n} is what this report of the motor is about now." for n in range(20))
    path = write_meetings(tmp_path / "m.jsonl", 2)
    records = [json.loads(line) | {"document": f"{line[8]} {sentences}"} for line in path.read_text().splitlines()]
    # an unusable first question does not take the copies away
    records[1]["query"][0]["summary"] = " "
    path.write_text("\n".join(map(json.dumps, records)))
    source = replace(replace_held_out(find_sources(str(path))["train"]), n_made=3, skips_bad=True)
    rows = list(source.rows("document", COLUMNS))
    assert [row.id for row in rows if not row.query] == [f"m{n} ({copy})" for n in range(2) for copy in range(3)]
    assert len(rows) == 8 + 7 + 6


def test_a_question_has_the_same_ids_beside_any_question_and_with_white_space_around(tokenizer):
    encoder = TextEncoder(tokenizer)
    alone = [encoder.queries([text])[0] for text in (" ", QUERY, "", "\n")]
    assert encoder.queries([" ", QUERY, "", "\n"]) == alone
    assert [bool(ids) for ids in alone] == [False, True, False, False]
    assert encoder.queries([f" {QUERY}\n"]) == [alone[1]]


def test_the_separator_is_part_of_the_cache(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"document": TEXT, "summary": "a", "query": QUERY}))
    source = replace_held_out(find_sources(str(tmp_path / "train.jsonl"))["train"])
    found = []
    for separator in ("</s>", "<pad>"):
        tokenizer = unigram()
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.eos_token = separator
        (query,) = load_corpus(source, "document", COLUMNS, tokenizer, tmp_path / "cache").rows["query"]
        assert query[-1:] == special_tokens_between(tokenizer)
        found.append(query[-1])
    assert found[0] != found[1]


def test_several_columns_may_have_lists_of_questions():
    record = {"document": TEXT, "a": [{"query": "x", "answer": "1"}], "b": [{"query": "y", "answer": "2"}], "c": "z"}
    columns = Columns(summary="answer", query="a, b")
    parts = split_queries(record, "document", columns, "f:1")
    found = [(read_query(part, columns.query, "f:1"), part["answer"], end) for part, end in parts]
    assert found == [("x", "1", " (query 1)"), ("y", "2", " (query 2)")]
    for query, message in (("a,d", "f:1: no column 'd'; "), ("a,c", "f:1: column 'c' must be a list of questions, ")):
        with pytest.raises(ValueError, match=message):
            split_queries(record, "document", replace(columns, query=query), "f:1")


@pytest.mark.parametrize("flag", ["query", "references"])
def test_the_embedded_corpus_refuses_columns_that_it_has_not(flag):
    with pytest.raises(ValueError, match=f"--{flag}_column x: the documents of --dataset stdlib have no columns"):
        next(find_sources("stdlib")["train"].rows("document", Columns(**{flag: "x"})))
