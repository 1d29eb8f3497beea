"""Time of the regular expressions that search users' texts: it is about linear in the length."""

import importlib
import re
import time

import pytest
import regex

from recurrent_bart.data.words import SENTENCE_END, sentences
from recurrent_bart.inference.bookmark import SENTENCE_CUT

# use of each pattern in the package: module, name, method
USES = [
    *(("data.words", name, "finditer") for name in ("WORD", "SPACED_WORD", "IGNORABLE", "QUOTE_OR_LINE_END")),
    ("data.words", "SENTENCE_END", "finditer"),
    *(("data.words", name, "match") for name in ("EAST_ASIAN", "ALL_UNSPACED")),
    *(("data.word_segmenter", name, "finditer") for name in ("HAS_JAPANESE", "BETWEEN_WORDS", "NO_BOUNDARY")),
    *(("data.word_segmenter", name, "finditer") for name in ("SPACED_LETTERS", "PART")),
    ("data.word_segmenter", "BESIDE_JAPANESE", "match"),
    *(("data.gap_sentences", name, "finditer") for name in ("PARAGRAPH_END", "WRAP")),
    ("data.gap_sentences", "FINAL_MARK", "search"),
    ("data.gap_sentences", "BULLET", "match"),
    ("data.rows", "HALF_CHARACTER", "search"),
    ("data.text_files", "UNDECODED", "search"),
    *(("data.jsonl", name, "match") for name in ("ARRAY_START", "ARRAY_DELIMITER")),
    *(("inference.bookmark", name, "match") for name in ("BEFORE_SPACE", "BEFORE_WHITE_SPACE")),
    ("inference.bookmark", "SENTENCE_CUT", "finditer"),
]
# one character of each class that a pattern names
CHARACTERS = "a字あก\u1039" + "0\u0301!.．。？" + ")”」「[" + " \n\t\r\u3000\u200b\u00ad" + "▁-:・,\ud800"
N_CHARACTERS = 50_000


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "method"), USES, ids=lambda value: value.split(".")[-1])
def test_a_long_run_of_one_character_is_searched_in_under_a_second(module, name, method):
    pattern = getattr(importlib.import_module(f"recurrent_bart.{module}"), name)
    for character in CHARACTERS:
        run = character * N_CHARACTERS
        for text in (run, f"字.{run}a字"):
            begin = time.thread_time()
            for _ in pattern.finditer(text) if method == "finditer" else [getattr(pattern, method)(text)]:
                pass
            assert time.thread_time() - begin < 1, (character, text[:3])


def test_the_table_of_this_file_has_all_patterns_of_its_modules():
    for module in {module for module, _, _ in USES}:
        content = vars(importlib.import_module(f"recurrent_bart.{module}"))
        patterns = {name for name, value in content.items() if isinstance(value, (re.Pattern, regex.Pattern))}
        assert patterns == {name for own, name, _ in USES if own == module}


def test_runs_of_marks_and_brackets_are_searched_in_linear_time():
    half = N_CHARACTERS // 2
    for text in ("!" * N_CHARACTERS, "字" + "!?" * half + "a", "「" * half + "）" * half):
        begin = time.thread_time()
        sentences(text)
        assert time.thread_time() - begin < 1
    begin = time.thread_time()
    assert [found.start() for found in SENTENCE_CUT.finditer("." + ")" * N_CHARACTERS + "a")] == [N_CHARACTERS + 1]
    assert time.thread_time() - begin < 1


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("字!a", [2]),
        ("字!?\u0301a", [3]),
        ("字\u0301!!a字", [4]),
        ("a!b", []),
        ("a!字", [2]),
        ("!!!a", []),
        ("字!!", [3]),
    ],
)
def test_an_exclamation_mark_ends_a_sentence_of_an_unspaced_script(text, ends):
    assert [found.end() for found in SENTENCE_END.finditer(text)] == ends
