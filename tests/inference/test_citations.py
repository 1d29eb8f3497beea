"""Tests that each sentence of a summary cites the passages that the decoder attended to."""

import functools

import pytest
import torch

from cited_documents import SENTENCES, TEXT, citing_summarizer
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference.citations import cite, cited_layers
from recurrent_bart.inference.shown_tokens import show_segments
from recurrent_bart.inference.stream_reader import TextReader
from recurrent_bart.inference.summarizer import Summarizer
from summaries import HOW


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES * 30, vocab_size=420)


@pytest.fixture
def build(tokenizer):
    """Return a function that builds a summarizer which attends to the answer, or to random positions."""
    return functools.partial(citing_summarizer, tokenizer)


@pytest.mark.parametrize("changes", [{}, {"decoder_context": "section"}, {"input_size": 13}, {"pre_seq_len": 0}])
def test_a_sentence_cites_the_passage_with_the_answer(build, changes):
    summary = build(**changes)(TEXT)
    assert summary.citations
    for citation in summary.citations:
        first = citation.passages[0]
        assert TEXT[first.start : first.end] == SENTENCES[2].strip()
        assert first.weight > 0.99
        assert 0 <= citation.state_share < 0.01


@pytest.mark.slow
def test_batches_with_padding_and_white_space_in_front_cite_the_right_text(build):
    texts = [TEXT, SENTENCES[2], f" \n\u3000{TEXT}", "".join(reversed(SENTENCES)), SENTENCES[0] + SENTENCES[2]]
    for tokens_per_batch in (40, 10_000):
        summaries = build(settings={"tokens_per_batch": tokens_per_batch})(texts)
        for text, summary in zip(texts, summaries, strict=True):
            for citation in summary.citations:
                first = citation.passages[0]
                assert text[first.start : first.end] == SENTENCES[2].strip()
                assert not summary.text[citation.start : citation.end][:1].isspace()


@pytest.mark.slow
@pytest.mark.parametrize("context", ["last", "memory", "section", "all"])
@pytest.mark.parametrize("attends", [True, False])
def test_a_session_in_pieces_cites_what_the_whole_text_cites(build, context, attends, tmp_path):
    summarizer = build(attends, decoder_context=context, input_size=12)
    text = f"  \n{TEXT}\n{TEXT}"
    expected = summarizer(text)
    assert expected.citations[0].passages
    for size in (1, 7, 50):
        session = summarizer.open(segments_per_call=2)
        for start in range(0, len(text), size):
            session.add(text[start : start + size])
            if start == 50:
                session.save(tmp_path / "state")
                session = summarizer.open()
                session.load(tmp_path / "state")
        found = session.summary()
        assert (found.text, found.citations) == (expected.text, expected.citations)
    assert returned(session.stream()) == session.summary()


def returned(pieces):
    """Return the value that a generator returns."""
    values = []

    def run():
        values.append((yield from pieces))

    assert list(run())
    return values[0]


@pytest.mark.parametrize("context", ["last", "memory", "section", "all"])
def test_weights_are_the_mean_attention_of_the_last_layers(build, context):
    summarizer = build(False, decoder_context=context, segment_size=8)
    model, reader = summarizer.model, TextReader(summarizer.model, summarizer.tokenizer)
    list(reader.feed(TEXT))
    *_, output = reader.finish()
    ids = model.generate(encoder_outputs=output, **HOW)[0]
    before = model.config._attn_implementation
    found = cite(model, summarizer.tokenizer, output, reader.shown, ids)
    assert model.config._attn_implementation == before
    assert not any(layer.encoder_attn._forward_hooks for layer in model.model.decoder.layers)
    model.config._attn_implementation = "eager"
    decoded = model.model.decode(output, input_ids=ids[:-1].unsqueeze(0), output_attentions=True)
    layers = decoded.cross_attentions[-len(cited_layers(model)) :]
    weights_A = torch.stack([layer[0].mean(dim=0) for layer in layers]).mean(dim=0).mean(dim=0)
    (citation,) = found
    assert citation.state_share == pytest.approx(weights_A[: output.n_memory].sum().item(), abs=1e-3)
    weights = dict.fromkeys(SENTENCES, 0.0)
    token_A = weights_A[output.n_memory :][output.context_mask[0, output.n_memory :].bool()]
    tokens = [token for token in reader.shown if token.segment == reader.shown[-1].segment or context != "memory"]
    for token, weight in zip(tokens, token_A.tolist(), strict=True):
        if token.start >= 0:
            weights[sentence_at(token.start)] += weight
    if context == "memory":
        earlier = [token for token in reader.shown if token.segment != reader.shown[-1].segment]
        parts = weights_A[: output.n_memory].view(len(earlier) + 1, -1).sum(dim=1).tolist()
        weights |= {(token.start, token.end): part for token, part in zip(earlier, parts, strict=False)}
    total = sum(weights.values())
    for passage in citation.passages:
        span = passage.start, passage.end
        weight = weights[span] if span in weights else weights[sentence_at(passage.start)]
        assert passage.weight == pytest.approx(weight / total, abs=1e-3)


def sentence_at(place):
    """Return the sentence with the character at this index."""
    for sentence in SENTENCES:
        place -= len(sentence)
        if place < 0:
            return sentence
    raise IndexError(place)


@pytest.mark.parametrize("context", ["section", "all"])
def test_positions_count_everything_that_a_session_with_sections_was_sent(build, context):
    session, sent = build(decoder_context=context).open(), ""
    for number, section in enumerate([f"{TEXT} \n", f"\n\n {SENTENCES[2]}", f"\n{SENTENCES[0]}{SENTENCES[2]}"]):
        session.add(section[:9])
        session.add(section[9:])
        start, sent = len(sent), sent + section
        for citation in session.end_section().citations:
            cited = [passage for passage in citation.passages if passage.weight > 0.2]
            assert {sent[passage.start : passage.end] for passage in cited} == {SENTENCES[2].strip()}
            assert context == "all" or all(passage.start >= start for passage in cited)
            assert len(cited) == (1 if context == "section" else number + 1)


def test_only_the_last_segment_is_cited_without_a_context_of_earlier_segments(build):
    summarizer = build(False, decoder_context="last")
    n_last = len(summarizer.encoder.tokens(TEXT)) % summarizer.room
    begin = summarizer.encoder.tokens(TEXT)[-n_last].start
    for citation in summarizer(TEXT).citations:
        assert all(passage.end > begin for passage in citation.passages)
        assert 0 < citation.state_share < 1


def test_each_sentence_has_its_own_citation(build, tokenizer):
    summarizer = build(False)
    text = "ant bee. 予算は足りますか？cow dog."
    ids = torch.tensor([2, 0, *tokenizer(text, add_special_tokens=False)["input_ids"], 2, 1, 1])
    segments = summarizer._segments(summarizer.encoder.tokens(TEXT))
    shown = show_segments([], segments, summarizer.model.config)
    reader = TextReader(summarizer.model, tokenizer)
    list(reader.feed(TEXT))
    *_, context = reader.finish()
    found = cite(summarizer.model, tokenizer, context, shown, ids)
    spans = [text[citation.start : citation.end] for citation in found]
    assert spans == ["ant bee.", "予算は足りますか？", "cow dog."]
    assert len({citation.passages[0].weight for citation in found}) == 3
    with pytest.raises(ValueError, match="tokens, but 3 are known"):
        cite(summarizer.model, tokenizer, context, shown[:3], ids)


def test_a_summary_without_words_has_no_citation(build, tokenizer):
    summarizer = build(False)
    reader = TextReader(summarizer.model, tokenizer)
    *_, context = (*reader.feed(TEXT), *reader.finish())
    assert cite(summarizer.model, tokenizer, context, reader.shown, torch.tensor([2, 0, 2, 1])) == []


@pytest.mark.slow
def test_citations_are_none_without_the_setting_and_leave_the_summary_alone(build):
    summarizer = build(False)
    plain = Summarizer(summarizer.model, summarizer.tokenizer, **summarizer.generation)
    assert plain(TEXT).citations is None
    assert "citations" not in plain(TEXT).record()
    assert plain(TEXT).text == summarizer(TEXT).text
    assert summarizer(TEXT).record()["citations"][0]["passages"][0].keys() == {"start", "end", "weight"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"input_size": 28}, {"decoder_context": "memory"}])
@pytest.mark.parametrize("tokens_per_batch", [60, 10_000])
def test_a_text_with_a_question_cites_the_text_alone(build, changes, tokens_per_batch):
    query = "ant?"
    summarizer = build(False, segment_size=24, settings={"tokens_per_batch": tokens_per_batch}, **changes)
    summary, other = summarizer([TEXT, SENTENCES[2]], [query, ""])
    assert summary.citations != summarizer(TEXT).citations
    assert other.citations == summarizer(SENTENCES[2]).citations
    session = summarizer.open(query=query)
    for start in range(0, len(TEXT), 9):
        session.add(TEXT[start : start + 9])
    assert session.summary().citations == summary.citations
    assert all(0 <= it.start < it.end <= len(TEXT) for found in summary.citations for it in found.passages)
