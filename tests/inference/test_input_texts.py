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


LINES = b"\xef\xbb\xbfone\r\ntwo \xff\rthree\n \n\xe6\x9d\xb1\n\n"


def texts_of(tmp_path, data, **how):
    (tmp_path / "lines").write_bytes(data)
    return [text.content for text in input_texts.all_texts([str(tmp_path / "lines")], each_line=True, **how)]


def test_a_byte_that_is_not_utf8_makes_only_its_own_line_unusable(tmp_path, capsys):
    assert texts_of(tmp_path, LINES, skips=True) == ["one", "", "three", "", "東", ""]
    warnings = capsys.readouterr().err.splitlines()
    reasons = ["2: not a UTF-8 text (invalid start byte: byte 0xff)", "4: the text is empty", "6: the text is empty"]
    assert warnings == [f"warning: {tmp_path}/lines:{reason}; this text is skipped" for reason in reasons]
    with pytest.raises(ValueError, match=r"lines:2: not a UTF-8 text .*0xff\); add --skip_bad_samples"):
        texts_of(tmp_path, LINES, skips=False)


def test_a_blank_file_has_a_text_for_each_line(tmp_path, capsys):
    assert texts_of(tmp_path, b"\n\r\n \n", skips=True) == ["", "", ""]
    assert "lines:3: the text is empty" in capsys.readouterr().err
