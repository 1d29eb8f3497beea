"""Streamed pieces join to the text that is generated at once."""

import threading
import time

import pytest
import torch
from transformers import GenerationConfig

from recurrent_bart.data.word_segmenter import join_words
from recurrent_bart.inference.text_stream import joined, stream_text, stripped


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["東京 ", "の ", "天気"], "東京の天気"),
        (["東京", " の", " 天気 "], "東京の天気"),
        (["天気 ", "", " は 3 ", "度 です"], "天気は3度です"),
        (["the ", "state of ", "BART モデル ", "is small"], "the state of BARTモデルis small"),
        ([" ", "  "], ""),
        ([], ""),
    ],
)
def test_spaces_between_segmented_words_go_wherever_the_pieces_end(pieces, text):
    assert join_words("".join(pieces)).strip() == text
    assert "".join(stripped(joined(pieces))) == text
    assert "".join(stripped(joined("".join(pieces)))) == text


class Broken:
    """Tokenizer whose decoding fails, and a model that generates one token for it."""

    generation_config = GenerationConfig()

    def decode(self, ids, **_):
        raise OverflowError("no such id")

    def generate(self, streamer, **_):
        streamer.put(torch.tensor([7]))


class Endless(Broken):
    """Model that generates until a criterion ends it."""

    def __init__(self):
        self.is_ended = False

    def decode(self, ids, **_):
        return "a " * len(ids)

    def generate(self, streamer, stopping_criteria, **_):
        ids = torch.tensor([[7]])
        while not any(criterion(ids, None).all() for criterion in stopping_criteria):
            streamer.put(ids[0])
            time.sleep(0.01)
        streamer.end()
        self.is_ended = True


@pytest.mark.timeout(20)
def test_a_closed_stream_ends_the_generation_and_its_thread():
    model, n_threads = Endless(), threading.active_count()
    stream = stream_text(model, model, None)
    assert next(stream) == "a"
    stream.close()
    assert model.is_ended
    assert threading.active_count() == n_threads


@pytest.mark.timeout(20)
def test_an_error_of_the_tokenizer_ends_the_stream():
    with pytest.raises(OverflowError, match="no such id"):
        list(stream_text(Broken(), Broken(), None))
