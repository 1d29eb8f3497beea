"""Tests that documents summarized in batches get the summaries that they get alone, in their order."""

import itertools

import pytest

from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference.stream_reader import TextReader, summary_after
from recurrent_bart.inference.summarizer import Summariser

WORDS = [f"the {word} of list_{number}" for number, word in enumerate(dir(str) * 2)]
# documents of one to many segments, shuffled by length
TEXTS = [" ".join(WORDS[start : start + n]) for start, n in enumerate((1, 7, 2, 1, 20, 3, 1, 12, 2, 7))]
# generate no special token
HOW = {"max_new_tokens": 12, "min_new_tokens": 12, "suppress_tokens": [0, 1, 3, 4]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=400)


@pytest.fixture
def model(make_model, tokenizer):
    # with the usual initialization a random model repeats one word for every document: that of the largest embedding
    model = make_model(vocab_size=len(tokenizer), init_std=1.0).requires_grad_(False)
    model.model.shared.weight /= model.model.shared.weight.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return model


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
    assert Summariser(model, tokenizer, tokens_per_batch, **how).summarise(TEXTS) == expected


def test_batches_hold_as_many_texts_as_fit(model, tokenizer, monkeypatch):
    shapes, encode = [], model.model.encode

    def note(input_ids, *rest, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return encode(input_ids, *rest, **kwargs)

    monkeypatch.setattr(model.model, "encode", note)
    Summariser(model, tokenizer, 80, **HOW).summarise(TEXTS)
    together = [shape for shape in shapes if shape[0] > 1]
    assert all(n_documents * n_segments <= 10 for n_documents, n_segments, _ in together)
    n_segments = [-(-len(ids) // 6) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    # documents that fit in one batch are batched
    assert sum(shape[0] for shape in together) >= sum(n <= 5 for n in n_segments) - 1


def test_a_text_without_tokens_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="document 2 of 3 has no tokens"):
        Summariser(model, tokenizer, 80).summarise(["the", " ", "list"])
