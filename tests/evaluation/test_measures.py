"""Measures of texts on cases worked out by hand."""

import pytest

from recurrent_bart.data.words import words
from recurrent_bart.evaluation.measures import (
    Source,
    coverage_and_density,
    fragment_lengths,
    measure,
    ngrams,
    novel_share,
    repeated_share,
    shares_by_part,
    shares_by_tenth,
)

SOURCE = Source(["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "away"])


def test_ngrams_stand_in_order():
    assert ngrams("abcd", 2) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert ngrams("ab", 3) == []


def test_the_share_of_repeated_ngrams():
    """The text has 6 4-grams: abca, bcab and cabc, each twice."""
    assert repeated_share("abcabcabc") == pytest.approx(50)
    assert repeated_share("abcd") == 0
    assert repeated_share("abc") is None
    assert repeated_share("aaa", n=1) == pytest.approx(200 / 3)


def test_the_share_of_novel_ngrams():
    text = ["the", "cat", "ran", "on", "the", "mat"]
    assert novel_share(text, SOURCE, 1) == 0
    # Of 5 bigrams, "cat ran" and "ran on" are new.
    assert novel_share(text, SOURCE, 2) == pytest.approx(40)
    assert novel_share(text, SOURCE, 4) == 100
    assert novel_share(["the"], SOURCE, 2) is None
    # A repeated n-gram counts each time.
    assert novel_share("xxxa", Source("a"), 1) == 75
    assert novel_share(text, Source([]), 1) == 100


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("the cat ran on the mat", [2, 1, 3]),
        ("the mat and the cow", [4]),
        ("cow", []),
        ("", []),
        ("away the", [1, 1]),
        ("ran away", [2]),
        # The fragment is the longest one, not the first one.
        ("the dog", [2]),
        ("cow the cat sat on the mat and the dog ran away cow", [11]),
    ],
)
def test_fragments_are_the_longest_runs_of_words_of_the_source(text, lengths):
    assert fragment_lengths(text.split(), SOURCE) == lengths


def test_fragments_in_a_source_that_repeats_itself():
    assert fragment_lengths("aab", Source("aaab")) == [3]
    assert fragment_lengths("aaaa", Source("aa")) == [2, 2]


def test_coverage_and_density():
    """The text has fragments of 2, 1 and 3 words, and one new word."""
    coverage, density = coverage_and_density(["the", "cat", "ran", "on", "the", "mat", "cow"], SOURCE)
    assert coverage == pytest.approx(100 * 6 / 7)
    assert density == pytest.approx((4 + 1 + 9) / 7)
    assert coverage_and_density([], SOURCE) == (None, None)
    assert coverage_and_density(["cow"], SOURCE) == (0, 0)


def test_a_bigram_counts_in_the_part_of_the_source_where_it_stands():
    """The source has 4 bigrams in 2 parts: ab and bc, then cd and da. The text has ab, bx and xd; ab is found."""
    assert shares_by_part("abxd", Source("abcda"), n_parts=2) == pytest.approx([100 / 3, 0])
    assert shares_by_part("cda", Source("abcda"), n_parts=2) == pytest.approx([0, 100])
    assert shares_by_part("a", Source("abcda"), n_parts=2) is None
    assert shares_by_part("ab", Source(""), n_parts=2) == [0, 0]


def test_a_bigram_at_several_places_counts_in_equal_fractions():
    """The bigrams of the source are ab ba, ab bc, cd da, ab bd; "ab" stands in three of the four parts."""
    assert shares_by_part("abd", Source("abab" + "cdabd"), n_parts=4) == pytest.approx([50 / 3, 50 / 3, 0, 50 / 3 + 50])
    # The text repeats a bigram, which counts once.
    assert shares_by_part("abab", Source("ab"), n_parts=1) == [50]


def test_shares_of_several_targets_are_averaged():
    source = [str(number) for number in range(11)]
    found = shares_by_tenth(source[8:], [source[:2], source[9:], ["x"]], Source(source))
    assert found["text"] == pytest.approx([0] * 8 + [50, 50])
    assert found["target"] == pytest.approx([50] + [0] * 8 + [50])
    assert shares_by_tenth([], [[]], Source(source)) == {"text": None, "target": None}


def test_targets_count_as_their_mean():
    found = measure(list("abcde"), [list("abcda"), list("abcdefghij"), []], Source("abcd"))
    assert found == pytest.approx(
        {
            "repeated_4grams": 0,
            "target_repeated_4grams": 0,
            "novel_1grams": 20,
            "novel_2grams": 25,
            "novel_4grams": 50,
            "target_novel_1grams": (0 + 60) / 2,
            "target_novel_2grams": (25 + 600 / 9) / 2,
            "target_novel_4grams": (50 + 600 / 7) / 2,
            "coverage": 80,
            "density": 16 / 5,
            "n_words": 5,
            "n_target_words": 5,
            "length_ratio": 1,
        }
    )


def test_an_empty_text_has_no_shares_but_a_length():
    found = measure([], [["a"]], Source(["a"]))
    known = {name for name, value in found.items() if value is not None}
    assert known == {"target_novel_1grams", "n_words", "n_target_words", "length_ratio"}
    assert found["n_words"] == found["length_ratio"] == 0
    assert measure(["a"], [[]], Source(["a"]))["length_ratio"] is None


def test_scripts_without_spaces_have_words():
    text, source = words("雨だ。寒い。"), Source(words("今日は雨だ。とても寒い。"))
    assert novel_share(text, source, 2) == pytest.approx(100 / 3)
    assert fragment_lengths(text, source) == [2, 2]
