"""Streamed pieces join to the text that is generated at once."""

import pytest

from recurrent_bart.data.word_segmenter import join_words
from recurrent_bart.inference.text_stream import joined, stripped


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
