"""Texts of files: pieces that end anywhere, and separators of sections."""

import io

import pytest

from recurrent_bart.inference import input_texts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_separators_are_found_wherever_pieces_end(size):
    text = "***\na\n ***\nb ***\n**\n****\n***\t\n\nc\n***"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    found = "".join("|" if part is None else part for part in input_texts.split_sections(iter(pieces), "***"))
    assert found == "|a\n|b ***\n**\n****\n|\nc\n|"


def test_a_line_that_is_no_separator_is_not_held_back():
    parts = input_texts.split_sections(iter(["***", "* a b", " c"]), "***")
    assert [next(parts) for _ in range(3)] == ["", "**** a b", " c"]


def test_pieces_may_end_within_a_character_or_line_end(monkeypatch):
    monkeypatch.setattr(input_texts, "BLOCK", 1)
    text = "\ufeffé\r\n東京\r🙂"
    assert "".join(input_texts.text_pieces(io.BytesIO(text.encode()), "name")) == "é\n東京\n🙂"
