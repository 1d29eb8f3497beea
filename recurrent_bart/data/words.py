"""Word and sentence segmentation of a text in any script, after Unicode normalisation."""

import unicodedata

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
# The zero-width space separates words, so it is not removed.
IGNORABLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}--\u200b]", regex.VERSION1)
# Scripts without spaces have no white space after a sentence.
SENTENCE_END = regex.compile(
    rf"""
      (?<=\p{{Sentence_Terminal}}) \s+
    | (?<=[。｡！？]) (?![。｡！？])
    | (?<={UNSPACED}\p{{M}}*[!?]+) (?![!?\s])
    | (?<=[!?]) (?={UNSPACED})
    | (?<={UNSPACED}\p{{M}}*[.．]) (?={UNSPACED})
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


def sentences(text: str) -> list[str]:
    """Return the sentences of a text without the white space between them."""
    return [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]
