"""Texts in the layouts of records."""

import pytest

from recurrent_bart.data.text_layouts import join_sentences, read_layout


@pytest.mark.parametrize(
    ("sentences", "joined"),
    [
        (["One.", " Two. "], "One. Two."),
        (["開会します。", "次に進みます。"], "開会します。次に進みます。"),
        (["会议开始。", "我们继续。"], "会议开始。我们继续。"),
        (["議題はNHK", "です。"], "議題はNHKです。"),
        (["賛成です。", "Thank you."], "賛成です。Thank you."),
        # Korean and Thai have spaces between sentences
        (["회의를 시작합니다.", "다음 안건입니다."], "회의를 시작합니다. 다음 안건입니다."),
        (["เริ่มประชุม", "ต่อไป"], "เริ่มประชุม ต่อไป"),
        # words that a segmenter has cut already
        (["会議 を 始め ます 。", "次 に 進み ます 。"], "会議 を 始め ます 。 次 に 進み ます 。"),
        # a space between short sentences is none between words
        (["はい。"] * 5, "はい。" * 5),
        (["はい", "いいえ"] * 3, "はいいいえ" * 3),
        (["", "One.", " "], "One."),
        ([], ""),
    ],
)
def test_sentences_are_joined_as_their_script_is_written(sentences, joined):
    assert join_sentences(sentences) == joined
    assert read_layout(sentences) == joined


def test_a_text_stays_as_it_is():
    assert read_layout(" a\n\nb ") == " a\n\nb "
    assert read_layout(None) == ""


def test_a_turn_is_a_line_with_its_speaker():
    turns = [
        {"speaker": "議長", "text": "開会します。\n次に進みます。"},
        {"speaker": " B ", "text": "Yes,\nof course."},
        None,
        {"speaker": "C", "text": " "},
        {"speaker": None, "text": "applause"},
        {"content": "a text under another key", "speaker": 7},
        {"text": "no speaker"},
    ]
    lines = [
        "議長: 開会します。次に進みます。",
        "B: Yes, of course.",
        "applause",
        "7: a text under another key",
        "no speaker",
    ]
    assert read_layout(turns) == "\n".join(lines)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a text, a list of its sentences, or a list of speaker turns, not int"),
        ({"speaker": "A", "text": "b"}, "must be .*, not dict"),
        (["a", 3], "must be .*; item 2 of the list is of type int"),
        ([["a"]], "must be .*; item 1 of the list is of type list"),
        ([{"speaker": "A", "text": "b"}, "c"], "must be .*; item 2 of the list is of type str beside turns"),
        ([{"speaker": "A"}], "has a speaker turn with no text: turn 1, whose keys are 'speaker'"),
        ([{}], "has a speaker turn with no text: turn 1, whose keys are none"),
        ([{"speaker": "A", "text": None}], "has a speaker turn with no text: turn 1"),
        ([{"speaker": "A", "text": ["b"]}], "has a speaker turn with a text of type list: turn 1"),
        ([{"speaker": ["A"], "text": "b"}], "has a speaker turn whose speaker is of type list: turn 1"),
    ],
)
def test_other_layouts_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_layout(value)
