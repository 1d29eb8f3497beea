"""Tests that documents summarized in batches get the summaries that they get alone, in their order."""

import itertools
import json
import threading

import pandas
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recurrent_bart.data.rows import Columns, make_row, refuse
from recurrent_bart.data.sources import Source
from recurrent_bart.data.text_encoder import TextEncoder
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference.prediction_file import predict_file
from recurrent_bart.inference.reading_session import Summary
from recurrent_bart.inference.stream_reader import TextReader, summary_after
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.inference.text_stream import stripped
from recurrent_bart.model.decoding.stopping import StopWhen
from summaries import HOW, WORDS, writing_model

# documents of one to many segments, shuffled by length
TEXTS = [" ".join(WORDS[start : start + n]) for start, n in enumerate((1, 7, 2, 1, 20, 3, 1, 12, 2, 7))]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=400)


@pytest.fixture
def model(tokenizer):
    return writing_model(tokenizer)


def alone(model, tokenizer, text, **how):
    reader = TextReader(model, tokenizer)
    *_, output = itertools.chain(reader.feed(text), reader.finish())
    return summary_after(output, model, tokenizer, **how)


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_batch", [8, 64, 10_000])
@pytest.mark.parametrize("how", [HOW, HOW | {"num_beams": 3}], ids=["greedy", "beam"])
def test_batched_summaries_equal_summaries_of_single_texts(model, tokenizer, tokens_per_batch, how):
    expected = [alone(model, tokenizer, text, **how) for text in TEXTS]
    assert len(set(expected)) >= 4
    summaries = Summarizer(model, tokenizer, tokens_per_batch, **how)(TEXTS)
    assert [summary.text for summary in summaries] == expected


@pytest.mark.slow
def test_batches_hold_as_many_texts_as_fit(model, tokenizer, monkeypatch):
    shapes, encode = [], model.model.encode

    def note(input_ids, *rest, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return encode(input_ids, *rest, **kwargs)

    monkeypatch.setattr(model.model, "encode", note)
    Summarizer(model, tokenizer, 80, **HOW)(TEXTS)
    together = [shape for shape in shapes if shape[0] > 1]
    assert all(n_documents * n_segments <= 10 for n_documents, n_segments, _ in together)
    n_segments = [-(-len(ids) // 6) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    # documents that fit in one batch are batched
    assert sum(shape[0] for shape in together) >= sum(n <= 5 for n in n_segments) - 1


def test_a_text_without_tokens_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="document 2 of 3 has no tokens"):
        Summarizer(model, tokenizer, 80)(["the", " ", "list"])


@pytest.mark.slow
def test_a_summary_says_what_it_was_made_from(model, tokenizer):
    n_tokens = [len(ids) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    whole = Summarizer(model, tokenizer, 64, **HOW)(TEXTS)
    assert [(s.n_tokens, s.n_segments, s.n_cut_tokens) for s in whole] == [(n, -(-n // 6), 0) for n in n_tokens]
    cut = Summarizer(model, tokenizer, 64, max_n_segments=2, **HOW)(TEXTS)
    assert [(s.n_tokens, s.n_cut_tokens) for s in cut] == [(min(n, 12), max(0, n - 12)) for n in n_tokens]
    assert [s.text == w.text for s, w in zip(cut, whole, strict=True)].count(True) >= sum(n <= 12 for n in n_tokens)
    assert Summarizer(model, tokenizer, **HOW)(TEXTS[4]) == whole[4]
    with pytest.raises(ValueError, match="max_n_segments 0: must be at least 1, or -1"):
        Summarizer(model, tokenizer, max_n_segments=0)


@pytest.mark.slow
def test_a_session_may_be_asked_at_any_time_and_goes_on(model, tokenizer, tmp_path):
    summarizer = Summarizer(model, tokenizer, **HOW)
    text, seen = TEXTS[4], []
    session = summarizer.open(segments_per_call=1)
    for start in range(0, len(text), 50):
        session.add(text[start : start + 50], lambda *counts: seen.append(counts))
        assert session.summary() == summarizer(text[: start + 50])
        session.save(tmp_path / "state")
        again = summarizer.open()
        again.load(tmp_path / "state")
        assert again.summary() == session.summary()
        assert again.n_characters == len(text[: start + 50])
    assert len(seen) == seen[-1][1] > 3
    assert seen == sorted(seen)


@pytest.mark.slow
@pytest.mark.parametrize("how", [HOW, HOW | {"num_beams": 2}], ids=["greedy", "beam"])
def test_a_text_that_is_streamed_is_the_summary(model, tokenizer, how):
    summarizer = Summarizer(model, tokenizer, **how)
    pieces = list(summarizer.stream(TEXTS[4]))
    assert "".join(pieces) == summarizer(TEXTS[4]).text
    assert (len(pieces) > 1) == ("num_beams" not in how)


def test_a_failure_while_streaming_is_raised(model, tokenizer, monkeypatch):
    session = Summarizer(model, tokenizer, **HOW).open()
    session.add(TEXTS[0])

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        list(session.stream())


def test_a_text_read_in_steps_may_be_left_and_gives_the_same_summary(model, tokenizer):
    summarizer = Summarizer(model, tokenizer, **HOW)
    session = summarizer.open(segments_per_call=1)
    assert len(list(session.add_in_steps(TEXTS[4]))) > 3
    left = session.read_to_end()
    next(left)
    left.close()
    assert session.summary() == session.summary() == summarizer(TEXTS[4])


@pytest.mark.slow
@pytest.mark.parametrize("how", [HOW, HOW | {"num_beams": 2}], ids=["greedy", "beam"])
def test_a_generation_ends_when_a_criterion_of_the_caller_says_so(model, tokenizer, how):
    texts = TEXTS[:2]
    alone = Summarizer(model, tokenizer, **how)
    for is_over in (False, True):
        criteria = [StopWhen(lambda is_over=is_over: is_over)]
        stopped = Summarizer(model, tokenizer, **how, stopping_criteria=criteria)
        found = [*stopped(texts), stopped(TEXTS[4])]
        expected = [*alone(texts), alone(TEXTS[4])]
        assert ([s.text for s in found] == [s.text for s in expected]) == (not is_over)
        assert ("".join(stopped.stream(TEXTS[4])) == expected[2].text) == (not is_over)


@pytest.mark.slow
def test_a_section_ends_with_its_summary(model, tokenizer):
    session, reader = Summarizer(model, tokenizer, **HOW).open(), TextReader(model, tokenizer)
    for text in TEXTS[:3]:
        session.add("\n\n" + text)
        *_, output = itertools.chain(reader.feed(text), reader.end_section())
        assert session.end_section().text == summary_after(output, model, tokenizer, **HOW)
    with pytest.raises(ValueError, match="the section has no tokens"):
        session.end_section()


def test_white_space_around_a_streamed_text_is_left_out():
    assert list(stripped(iter(["", " ", " a", "b ", " c", " \n", ""]))) == ["a", "b", "  c"]


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast", "slow"])
def test_a_thread_encodes_ahead_with_fast_tokenizers_only(model, tokenizer, monkeypatch, is_fast):
    """Texts that cannot be encoded have None, and the next ones go on."""
    summarizer, threads = Summarizer(model, tokenizer, **HOW), []
    groups = [[TEXTS[0]], [TEXTS[1]], [TEXTS[2], TEXTS[3]]]
    expected = [summarizer.encode(group) for group in groups]
    encode = summarizer.encode

    def note(texts):
        threads.append(threading.current_thread())
        if texts == groups[1]:
            raise ValueError("no room")
        return encode(texts)

    monkeypatch.setattr(summarizer, "encode", note)
    if not is_fast:
        monkeypatch.setattr("recurrent_bart.inference.summarizer.PreTrainedTokenizerFast", int)
    found = list(summarizer.encode_ahead(groups, lambda group: [group]))
    assert found == [(groups[0], expected[0]), (groups[1], None), (groups[2], expected[2])]
    assert len(threads) == 3
    assert (threading.main_thread() in threads) is not is_fast
    monkeypatch.undo()
    assert [s.text for s in summarizer.summarize(expected[2])] == [s.text for s in summarizer(groups[2])]


def test_a_file_is_encoded_ahead(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"document": text}) + "\n" for text in TEXTS[:2]))
    summarizer, given = Summarizer(model, tokenizer, **HOW), []
    summarize = summarizer.summarize
    monkeypatch.setattr(summarizer, "summarize", lambda texts: given.append(texts) or summarize(texts))
    assert summarizer.predict(tmp_path / "a.jsonl", tmp_path / "out") == 2
    assert given == [summarizer.encode(TEXTS[:2])]


RECORDS = [{"id": 7, "document": TEXTS[1]}, {"id": "b", "document": " "}, {"id": "c", "document": TEXTS[0]}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_file_keeps_its_ids_and_names_its_bad_rows(model, tokenizer, tmp_path, suffix):
    source, output, bad = tmp_path / f"texts{suffix}", tmp_path / "out.jsonl", []
    frame = pandas.DataFrame([{**row, "id": str(row["id"])} for row in RECORDS])
    if suffix == ".jsonl":
        source.write_text("\n".join([*map(json.dumps, RECORDS), "{", '{"id": 9, "text": "a"}']))
    elif suffix == ".csv":
        frame.to_csv(source, index=False)
    else:
        frame.to_parquet(source)
    summarizer = Summarizer(model, tokenizer, **HOW)
    assert summarizer.predict(source, output, on_bad=lambda error: bad.append(str(error))) == 2
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [str(line["id"]) for line in lines] == ["7", "c"]
    assert [line["summary"] for line in lines] == [s.text for s in summarizer([TEXTS[1], TEXTS[0]])]
    assert lines[0]["n_tokens"] == summarizer(TEXTS[1]).n_tokens
    assert "column 'document' is blank" in bad[0]
    if suffix == ".jsonl":
        assert "texts.jsonl:4: unreadable line" in bad[1]
        assert "texts.jsonl:5: column 'document' is missing; the columns are 'id', 'text'" in bad[2]
    with pytest.raises(ValueError, match="column 'document' is blank"):
        summarizer.predict(source, tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))


def test_a_row_whose_text_has_no_tokens_is_found(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"document": text}) + "\n" for text in "abc"))

    def summarize(texts):
        if "b" in texts:
            raise ValueError("no tokens")
        return [Summary(text, 1, 1) for text in texts]

    bad = []
    assert predict_file(summarize, tmp_path / "a.jsonl", tmp_path / "out", ("document", "id"), bad.append) == 2
    assert [str(error) for error in bad] == [f"{tmp_path}/a.jsonl:2: no tokens"]
    ids = [json.loads(line)["id"] for line in (tmp_path / "out").read_text().splitlines()]
    assert ids == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_without_a_usable_id_have_the_names_that_an_evaluation_gives_them(tmp_path, suffix):
    source, ids = tmp_path / f"a{suffix}", [None, "", " ", 0, 2.5]
    if suffix == ".jsonl":
        ids.append(float("nan"))
        source.write_text("".join(json.dumps({"document": "a", "summary": "s", "id": id}) + "\n" for id in ids))
    else:
        ids = ids[:3] if suffix == ".csv" else [float("nan"), 0.0, 2.5]
        frame = pandas.DataFrame({"document": "a", "summary": "s", "id": ids})
        frame.to_csv(source, index=False) if suffix == ".csv" else frame.to_parquet(source)
    names = [row.id for row in Source("file", "a", "train", (source,)).rows("document", Columns())]
    assert len(names) == len(ids)

    def summarize(texts):
        return [Summary(text, 1, 1) for text in texts]

    predict_file(summarize, source, tmp_path / "out", ("document", "id"), refuse)
    lines = (tmp_path / "out").read_text().splitlines()
    assert [str(json.loads(line, parse_constant=pytest.fail)["id"]) for line in lines] == names


def test_half_characters_are_bad_rows_and_ids_may_be_dates(tmp_path):
    rows = [{"document": "a", "id": "x"}, {"document": "\ud800"}]
    rows += [{"document": "b", "id": id} for id in ("\ud800", ["\ud800"], {"\udfff": 1})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = []

    def summarize(texts):
        return [Summary(text, 1, 1) for text in texts]

    assert predict_file(summarize, tmp_path / "a.jsonl", tmp_path / "out", ("document", "id"), bad.append) == 1
    places = [f"{tmp_path}/a.jsonl:{line}: the text, the id or the query has half a character" for line in (2, 3, 4, 5)]
    assert [str(error).partition(" (")[0] for error in bad] == places
    frame = pandas.DataFrame({"document": ["a"], "id": [pandas.Timestamp("2026-11-30")]})
    frame.to_parquet(tmp_path / "b.parquet")
    assert predict_file(summarize, tmp_path / "b.parquet", tmp_path / "out", ("document", "id"), bad.append) == 1
    assert json.loads((tmp_path / "out").read_text())["id"].startswith("2026-11-30")


def test_white_space_before_a_text_is_read_by_sessions_too(model, tokenizer):
    summarizer = Summarizer(model, tokenizer, **HOW)
    session, whole = summarizer.open(), f"\n  {TEXTS[0]}"
    for piece in (whole[:2], whole[2:7], whole[7:]):
        session.add(piece)
    assert session.summary().n_tokens == summarizer(whole).n_tokens
    assert session.summary().text == summarizer(whole).text


@pytest.fixture(scope="module")
def byte_level():
    """Return a byte-level BPE tokenizer, in which a line end is a token, as BART's is."""
    backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<m>"}
    names = list(special.values())
    backend.train_from_iterator(WORDS, trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet))
    around = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize("citations", [False, True])
def test_white_space_at_the_end_of_a_text_is_not_read(byte_level, citations):
    """The text fills its segment, so a token more would begin another segment."""
    text, encoder = " list of" * 3, TextEncoder(byte_level)
    assert [len(ids) for ids in encoder([text, f"{text}\n"])] == [6, 7]
    document = make_row({"document": f"{text}\n", "summary": "s"}, "document", Columns(), "f:1").sections[0]
    summarizer = Summarizer(writing_model(byte_level), byte_level, citations=citations, **HOW)
    expected, *others = summarizer([document, text, f"{text}\n", f"{text} \n\n"])
    assert expected.n_segments == 1
    assert others == [expected] * 3
