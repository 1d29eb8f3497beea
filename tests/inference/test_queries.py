"""Summaries of texts with a question: alone, in batches, in pieces and from a saved state."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recurrent_bart.data.text_encoder import TextEncoder, decode_text
from recurrent_bart.data.tokenizer import special_tokens_around, train_tokenizer
from recurrent_bart.inference.stream_reader import TextReader, summary_after
from recurrent_bart.inference.summarizer import Summarizer
from summaries import HOW, WORDS, writing_model

TEXTS = [" ".join(WORDS[start : start + n]) for start, n in enumerate((1, 7, 2, 20, 12))]
QUERIES = ["the list", "", "index of what", "the list", "count"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return writing_model(tokenizer, segment_size=16, input_size=18)


def expected(model, tokenizer, text, query):
    """Return the summary of ids that are put together by hand."""
    encoder = TextEncoder(tokenizer)
    (leading, trailing), (question,), (ids,) = (
        special_tokens_around(tokenizer),
        encoder.queries([query]),
        encoder([text]),
    )
    room = 16 - len(leading) - len(trailing) - len(question)
    starts = range(0, len(ids), room)
    segments = [[*leading, *question, *ids[max(0, at - 2) : at + room], *trailing] for at in starts]
    most = max(map(len, segments))
    padded = torch.tensor([segment + [-1] * (most - len(segment)) for segment in segments]).unsqueeze(0)
    (generated,) = model.generate(padded.masked_fill(padded < 0, 1), attention_mask=(padded >= 0).long(), **HOW)
    return decode_text(tokenizer, generated).strip(), len(segments)


def test_a_question_changes_ids_summary_and_segments_as_by_hand(model, tokenizer):
    found = Summarizer(model, tokenizer, 80, **HOW)(TEXTS, QUERIES)
    by_hand = [expected(model, tokenizer, *both) for both in zip(TEXTS, QUERIES, strict=True)]
    assert [(summary.text, summary.n_segments) for summary in found] == by_hand
    without = Summarizer(model, tokenizer, 80, **HOW)(TEXTS)
    assert [a.text == b.text for a, b in zip(found, without, strict=True)].count(True) < len(TEXTS)
    assert found[1] == without[1]


@pytest.mark.parametrize(
    "size", [pytest.param(3, marks=pytest.mark.slow), 40, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_batches_sessions_and_streams_answer_alike(model, tokenizer, size, tmp_path):
    asking = Summarizer(model, tokenizer, 40, query="the list", **HOW)
    plain = Summarizer(model, tokenizer, **HOW)
    text, answer = TEXTS[3], asking(TEXTS[3])
    assert plain(text, "the list") == answer
    assert "".join(plain.stream(text, "the list")) == "".join(asking.stream(text)) == answer.text
    session = plain.open(query="the list")
    for start in range(0, len(text), size):
        session.add(text[start : start + size])
        session.save(tmp_path / "state")
        # a saved state brings its question
        session = plain.open()
        session.load(tmp_path / "state")
        assert session.reader.query == "the list"
    assert session.summary().text == answer.text
    with pytest.raises(ValueError, match="the state was saved with the query 'the list', not with 'count'"):
        plain.open(query="count").load(tmp_path / "state")
    assert asking.open(query="").reader.query == ""
    spaced = Summarizer(model, tokenizer, 40, query=" the list\n", **HOW)
    assert spaced(text) == plain(text, "the list\n") == answer
    reader = spaced.open().reader
    reader.load(tmp_path / "state")
    assert reader.query == "the list"


def test_states_of_other_formats_are_refused(model, tokenizer, tmp_path):
    for query in ("the list", "", " "):
        session = Summarizer(model, tokenizer, query=query, **HOW).open()
        session.add(TEXTS[3])
        session.save(tmp_path / "state")
        with safe_open(tmp_path / "state", framework="pt") as file:
            metadata = file.metadata()
        assert (metadata["format"], metadata["query"]) == ("recurrent_bart reading 6", query.strip())
        # versions that know no questions would read on without the question
        for older in ("recurrent_bart reading 5", "recurrent_bart reading 5 with a query"):
            save_file(load_file(tmp_path / "state"), tmp_path / "older", metadata | {"format": older})
            with pytest.raises(ValueError, match=f"format '{older}' found, 'recurrent_bart reading 6' required"):
                Summarizer(model, tokenizer, **HOW).open().load(tmp_path / "older")


def test_each_section_is_read_with_the_question(model, tokenizer):
    session, reader = Summarizer(model, tokenizer, query="the list", **HOW).open(), TextReader(model, tokenizer)
    texts = []
    for text in TEXTS[:2]:
        session.add(text)
        texts.append(session.end_section().text)
    without = []
    for text in TEXTS[:2]:
        *_, output = itertools.chain(reader.feed(text), reader.end_section())
        without.append(summary_after(output, model, tokenizer, **HOW))
    assert texts != without


def test_a_question_without_room_and_a_wrong_number_are_refused(model, tokenizer):
    long = "the list of names " * 5
    summarizer = Summarizer(model, tokenizer, **HOW)
    message = "the query has .* tokens .* no room for text in segments of 16 tokens"
    with pytest.raises(ValueError, match=f"--query of text 1: {message}"):
        summarizer(TEXTS[0], long)
    with pytest.raises(ValueError, match=message):
        summarizer.open(query=long)
    with pytest.raises(ValueError, match=f"^--query: {message}"):
        Summarizer(model, tokenizer, query=long, **HOW)
    with pytest.raises(ValueError, match="2 queries for 1 texts: give one query for each text"):
        summarizer(TEXTS[:1], QUERIES[:2])


def test_cut_texts_count_the_tokens_behind_their_own_segments(model, tokenizer):
    asked, plain = Summarizer(model, tokenizer, max_n_segments=2, **HOW)([TEXTS[3]] * 2, ["the list", ""])
    assert asked.n_segments == plain.n_segments == 2
    assert plain.n_tokens == 2 * 14
    assert asked.n_tokens == 2 * (14 - len(TextEncoder(tokenizer).queries(["the list"])[0]))


def test_a_file_may_have_a_question_in_each_row(model, tokenizer, tmp_path):
    rows = [{"document": text, "query": query} for text, query in zip(TEXTS, QUERIES, strict=True)]
    rows[0]["document"], bad = [TEXTS[0]], []
    rows += [{"document": "a", "query": 3}, {"document": 3, "query": "a"}, {"document": "a", "question": "a"}]
    rows += [{"document": "a", "query": query} for query in (0, False, [])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summarizer = Summarizer(model, tokenizer, **HOW)
    assert summarizer.predict(tmp_path / "a.jsonl", tmp_path / "out", on_bad=bad.append, query_column="query") == 5
    lines = [json.loads(line)["summary"] for line in (tmp_path / "out").read_text().splitlines()]
    assert lines == [summary.text for summary in summarizer(TEXTS, QUERIES)]
    assert [str(error).removeprefix(f"{tmp_path}/") for error in bad] == [
        "a.jsonl:6: column 'query' must be a text, not int (--query_column)",
        "a.jsonl:7: column 'document' must be a text, a list of its sentences, or a list of speaker turns, not int",
        "a.jsonl:8: no column 'query'; the columns are 'document', 'question'; choose with --query_column",
        "a.jsonl:9: column 'query' must be a text, not int (--query_column)",
        "a.jsonl:10: column 'query' must be a text, not bool (--query_column)",
        "a.jsonl:11: column 'query' must be a text, not list (--query_column)",
    ]
