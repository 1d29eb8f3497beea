"""Word and sentence segmentation of a text in any script, after Unicode normalisation."""

import itertools
import unicodedata
from collections import Counter

import regex

# Scripts without spaces between words.
UNSPACED_SCRIPTS = (
    r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Bopomofo}\p{Yi}\p{Tangut}\p{Nushu}"
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}"
)
UNSPACED = rf"[[\p{{L}}\p{{Nl}}]&&[{UNSPACED_SCRIPTS}]]"
# Signs that join the next consonant to the previous one (Myanmar, Khmer, Tai Tham).
JOINERS = r"\u1039\u17d2\u1a60"
WORD = regex.compile(
    rf"""
      {UNSPACED} \p{{M}}* (?: (?<=[{JOINERS}]) {UNSPACED} \p{{M}}* )*
    | [[\p{{L}}\p{{N}}]--{UNSPACED}] [[\p{{L}}\p{{N}}\p{{M}}]--{UNSPACED}]*
    """,
    regex.VERSION1 | regex.VERBOSE,
)
SPACED_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")
# The zero-width space separates words, so it is not removed.
IGNORABLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]", regex.VERSION1)
# Japanese and Chinese quotes and brackets. A sentence does not end inside them.
CLOSED_BY = {"「": "」", "『": "』", "（": "）", "｢": "｣", "【": "】", "〔": "〕", "〈": "〉", "《": "》"}
QUOTE_OR_LINE_END = regex.compile(rf"[\n{''.join(CLOSED_BY)}{''.join(CLOSED_BY.values())}]")
# Characters of an average word. Words of East Asia have about two, words of Southeast Asia about three.
EAST_ASIAN = regex.compile(r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Bopomofo}\p{Yi}\p{Tangut}\p{Nushu}]")
ALL_UNSPACED = regex.compile(UNSPACED, regex.VERSION1)
EAST_ASIAN_WORD, SOUTHEAST_ASIAN_WORD = 2, 3
# Scripts without spaces have no white space after a sentence. The lookbehind that repeats comes last, so that a run of
# marks is searched once.
SENTENCE_END = regex.compile(
    rf"""
      (?<=\p{{Sentence_Terminal}}) \s+
    | (?<=[。｡！？]) (?![。｡！？])
    | (?<=[!?]) (?![!?\s]) (?<={UNSPACED}\p{{M}}*[!?]+)
    | (?<=[!?]) (?={UNSPACED})
    | (?<={UNSPACED}\p{{M}}*\.) (?={UNSPACED})
    | (?<={UNSPACED}\p{{M}}*．) (?=[\p{{L}}\p{{N}}\p{{Ps}}])
    | \n+
    """,
    regex.VERSION1 | regex.VERBOSE,
)


def normalise(text: str) -> str:
    """Return the text in Unicode's NFKC_Casefold form, in which words are compared.

    Half-width kana, full-width letters, ligatures, decomposed accents and decomposed Hangul become the usual
    characters. Case is folded. Invisible characters, for example soft hyphens and joiners, are dropped.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", IGNORABLE.sub("", folded))


def words(text: str) -> list[str]:
    """Return the normalised words of a text. In scripts without spaces, each character with its marks is a word."""
    return WORD.findall(normalise(text))


def segmented_words(text: str) -> list[str]:
    """Return the normalised words of a text with spaces between its words, in any script."""
    return SPACED_WORD.findall(normalise(text))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text without the white space between them."""
    ends = [*sentence_ends(text), len(text)]
    parts = (text[start:end].strip() for start, end in itertools.pairwise([0, *ends]))
    return [sentence for sentence in parts if sentence]


def sentence_ends(text: str) -> list[int]:
    """Return the index behind each sentence and the white space after it. The end of the text may be missing.

    Sentences end by the rules of their script. They do not end inside a pair of `CLOSED_BY` in one line.
    """
    quotes = iter([*_quotes(text), (len(text), len(text))])
    start, end = next(quotes)
    found = []
    for boundary in SENTENCE_END.finditer(text):
        while boundary.end() > end:
            start, end = next(quotes)
        if boundary.end() <= start:
            found.append(boundary.end())
    return found


def _quotes(text: str) -> list[tuple[int, int]]:
    """Return start and end of the outermost quotes that open and close in one line."""
    found: list[tuple[int, int]] = []
    opened: list[int] = []
    # closing signs of the opened brackets
    awaited: Counter[str] = Counter()
    for sign in QUOTE_OR_LINE_END.finditer(text):
        if sign[0] == "\n":
            opened = []
            awaited.clear()
        elif sign[0] in CLOSED_BY:
            opened.append(sign.start())
            awaited[CLOSED_BY[sign[0]]] += 1
        elif awaited[sign[0]]:
            closing = ""
            # a bracket that nothing closes ends with the quote around it
            while closing != sign[0]:
                start = opened.pop()
                closing = CLOSED_BY[text[start]]
                awaited[closing] -= 1
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, sign.start()))
    return found


def n_usual_words(counts: Counter[str]) -> int:
    """Return the usual number of words for the counts of `words`: a word of unspaced scripts has several characters."""
    n_words = 0.0
    for word, n in counts.items():
        if ALL_UNSPACED.match(word):
            n_words += n / (EAST_ASIAN_WORD if EAST_ASIAN.match(word) else SOUTHEAST_ASIAN_WORD)
        else:
            n_words += n
    return round(n_words)
