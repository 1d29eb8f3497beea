"""Targets made of a document's own sentences: the best ones, in order, kept in the text or replaced."""

import re
import textwrap

import pytest

from recurrent_bart.data.gap_sentences import GAP, KEPT, MOST_PIECES, PIECE_WORDS, TAKEN, _sentences, gap_sentence_rows
from recurrent_bart.data.rows import Row

# The second sentence of each paragraph shares its words with other paragraphs; the rest of the sentences do not.
TELLING = "the {0} of the pump and the {0} of the motor are what this report is about"
OTHER = "{0}one {0}two {0}three {0}four {0}five {0}six {0}seven {0}eight {0}nine {0}ten"


def section(name, n_paragraphs):
    """Build paragraphs with sentences of 10 and of 17 words, and with all kinds of separators."""
    texts = [OTHER.format(f"{name}{number}") + ". " + TELLING.format(name) + "!\n" for number in range(n_paragraphs)]
    return "".join(texts)


@pytest.fixture
def row():
    return Row("d", [section("speed", 60), section("noise", 12)], ["first", "last"])


def without_asking(text):
    return text.removeprefix(KEPT).removeprefix(TAKEN)


def test_whole_sections_keep_their_target_sentences(row):
    (made,) = gap_sentence_rows(row, 1, "sections")
    assert made.sections == [KEPT + text for text in row.sections]
    for text, target in zip(row.sections, made.summaries, strict=True):
        lines = target.split("\n")
        assert len(set(lines)) == 1
        assert lines[0] in text
        # Enough sentences for 60 words.
        assert [len(line.split()) for line in lines] == [17] * 4


def test_pieces_are_shorter_than_a_segment_and_some_have_gaps(row):
    texts, n_gaps = [], 0
    for made in list(gap_sentence_rows(row, 9, "sections"))[1::3]:
        assert len(made.sections) <= MOST_PIECES
        for text, target in zip(made.sections, made.summaries, strict=True):
            assert text.startswith((KEPT, TAKEN))
            assert len(without_asking(text).split()) <= PIECE_WORDS[1]
            # No piece crosses a section boundary.
            assert ("speed" in text) != ("noise" in text)
            n_taken = len(target.split("\n"))
            if text.startswith(TAKEN):
                assert text.count(GAP) == n_taken
                n_gaps += 1
            else:
                assert GAP not in text
                assert target.split("\n")[0] in text
        texts += made.sections
    assert 0 < n_gaps < len(texts)


def test_a_filled_gap_restores_the_document():
    text = section("speed", 12)
    row = Row("d", [text], ["summary"])
    found = set()
    for made in gap_sentence_rows(row, 20, "document"):
        (asked,), (target,) = made.sections, made.summaries
        found.add(asked.split(" ")[0])
        for line in target.split("\n"):
            asked = asked.replace(GAP, line, 1)
        assert without_asking(asked) == text
    assert found == {KEPT.strip(), TAKEN.strip()}


def test_rows_are_repeatable_and_differ_from_each_other(row):
    made = list(gap_sentence_rows(row, 6, "sections"))
    assert list(gap_sentence_rows(row, 6, "sections")) == made
    assert made[:4] == list(gap_sentence_rows(row, 4, "sections"))
    assert len({one.id for one in made} | {row.id}) == 7
    # Whole documents have the same candidate sentences each time; pieces begin elsewhere.
    assert len({tuple(one.sections) for one in made}) == 5


def test_each_row_takes_different_sentences():
    words = [f"the flow in pipe {number} is what the flow in this report is about" for number in range(30)]
    rows = gap_sentence_rows(Row("d", [". ".join(words) + "."], ["summary"]), 8, "document")
    assert len({made.summaries[0] for made in rows}) == 8


def test_sentences_are_found_in_scripts_without_spaces():
    names = "温度", "圧力", "速度", "重量", "価格"
    sentences = [f"この装置の{name}は報告書の本文で説明されている。" for name in names]
    (made,) = gap_sentence_rows(Row("d", ["".join(sentences) * 3], ["要約"]), 1, "document")
    assert made.summaries[0].count("。") == made.summaries[0].count("この装置") > 1
    assert made.summaries[0].endswith("。")


def test_hindi_words_are_counted_whole():
    """A target has at least 60 words, so five sentences of twelve words."""
    sentence = "इस मशीन की गति और तापमान पूरे प्रतिवेदन में बताए गए हैं।"
    assert len(sentence.split()) == 12
    (made,) = gap_sentence_rows(Row("d", [" ".join([sentence] * 20)], ["सार"]), 1, "document")
    assert made.summaries == [" ".join([sentence] * 5)]


def test_words_with_different_vowel_signs_differ():
    """No sentences share a word, so no sentence is usable."""
    lines = [" ".join(consonant + vowel for consonant in "कखगघचछजझटठ") for vowel in "ािीुूेै"]
    assert not list(gap_sentence_rows(Row("d", ["\n".join(lines)], ["सार"]), 3, "document"))
    assert list(gap_sentence_rows(Row("d", ["\n".join(lines * 2)], ["सार"]), 3, "document"))


@pytest.mark.parametrize("text", ["too short. to be told.", "", OTHER.format("x") + ". " + OTHER.format("y") + "."])
def test_documents_without_a_suitable_sentence_give_no_row(text):
    assert not list(gap_sentence_rows(Row("d", [text], ["summary"]), 3, "sections"))


@pytest.mark.parametrize(("n_left", "is_usable"), [(23, False), (24, True)])
def test_a_target_has_at_most_half_of_the_words(n_left, is_usable):
    """Two sentences of 12 words share their words, so both are taken. No other sentence is usable."""
    taken = "the speed of the pump is what this whole report is about"
    assert len(taken.split()) == 12
    left = " ".join(f"x{number}" for number in range(n_left))
    made = list(gap_sentence_rows(Row("d", [f"{taken}. {taken}. {left}."], ["summary"]), 9, "document"))
    assert len(made) == (9 if is_usable else 0)
    assert {row.summaries[0] for row in made} == ({f"{taken}. {taken}."} if is_usable else set())


def test_long_japanese_sentences_can_be_chosen():
    """A sentence of 80 characters has about 40 words."""
    sentences = [f"第{number}号議案の{'予算と人員と設備の' * 8}説明を求めます。" for number in "一二三四五六"]
    assert all(80 <= len(sentence) <= 100 for sentence in sentences)
    (made,) = gap_sentence_rows(Row("d", ["".join(sentences)], ["要約"]), 1, "document")
    assert made.summaries[0].count("。") == 2
    assert {*made.summaries[0].split("。")} - {""} <= {sentence[:-1] for sentence in sentences}


def test_lines_of_a_wrapped_sentence_are_joined():
    sentences = [f"the pump number {number} and the motor are this report of the pump is on." for number in range(8)]
    wrapped = textwrap.fill(" ".join(sentences), 60)
    assert wrapped.count("\n") > 8
    for number in range(4):
        rows = list(gap_sentence_rows(Row(f"d{number}", [wrapped], ["summary"]), 4, "document"))
        assert len(rows) == 4
        for made in rows:
            found = re.findall(r"[^.]+\.", made.summaries[0])
            assert {" ".join(sentence.split()) for sentence in found} <= {*sentences}
            # a line end may stand between two sentences of a target, and not inside one
            assert all("\n" not in sentence.strip() for sentence in found)


def test_wrapped_japanese_lines_are_joined_without_a_space():
    sentence = "この装置の温度は報告書の本文で詳しく説明されているので確認してください。"
    text = sentence * 20
    wrapped = "\n".join(text[start : start + 30] for start in range(0, len(text), 30))
    (made,) = gap_sentence_rows(Row("d", [wrapped], ["要約"]), 1, "document")
    assert {part + "。" for part in made.summaries[0].replace("\n", "").split("。") if part} == {sentence}
    assert " " not in made.summaries[0]


def test_headings_lists_and_short_lines_stay_sentences():
    lines = ["- the flow in the pipe of the pump is what this report is about", "* the flow of the pump", "a heading"]
    text = "\n".join([*lines, lines[0]])
    assert [sentence.text for sentence in _sentences([text])[0]] == [f"{line}\n" for line in lines] + [lines[0]]
