"""Position in a text that is being read, and the tokens of this text that no later text can change."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import regex

from recurrent_bart.data.text_encoder import TextEncoder, Token
from recurrent_bart.data.word_segmenter import joins_words
from recurrent_bart.inference.shown_tokens import ShownToken
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState

# characters without white space after which a text is cut inside a word, which may change a token or two
LONGEST_WORD = 2**16
# characters tokenized in one step, which takes well under a second
PIECE = 2**12
# Cut before white space, so that no word or run of spaces is split; not before "▁", the unigram tokenizers' mark of a
# space.
BEFORE_SPACE = re.compile(r"(?s).*(?<=\S)(?= \s*[^\s▁])")
BEFORE_WHITE_SPACE = re.compile(r"(?s).*(?<=\S)(?=[ \t\n\r]\s*[^\s▁])")
# Ends of sentences without white space behind them, and places before an ideographic space. The ids of a sentence may
# still depend on the next characters, so each place is checked before a text is cut there. The lookbehind that repeats
# comes last, so that a run of brackets is searched once.
SENTENCE_CUT = regex.compile(
    r"(?=[^\s\p{Sentence_Terminal}\p{Pe}\p{Pf}])(?<=\p{Sentence_Terminal}[\p{Pe}\p{Pf}]*)|(?<=\S)(?=\u3000+\S)"
)
# characters behind a cut that are known before the text is cut there, more than a token has
LOOKAHEAD = 32
# places that are checked, the last ones of the text
N_PLACES = 4
# characters without an end of a sentence after which a text is cut inside a sentence, where its ids are settled
LONGEST_SENTENCE = 2048
# characters in front of a cut inside a sentence that decide the ids after the cut
CONTEXT = 8 * LOOKAHEAD


@dataclass
class Bookmark:
    """Position in a text that is being read.

    Attributes:
        state: State after the segments read so far; None at the beginning.
        overlap: Last tokens that were read; the next segment begins with them.
        tokens: Tokens not read yet, because they may belong to the last segment of the text.
        text: Characters not tokenized yet, because the next part may continue the last word.
        context: Characters in front of `text` whose ids are read already, because the ids of `text` depend on them;
            empty if the text in front ends with a word and white space follows.
        position: Number of characters in front of `text`.
        n_tokens: Number of tokens in front of `tokens`, without special tokens.
        n_segments: Number of segments in front of `tokens`.
        shown: Tokens that the decoder attends to after the segments read so far.
        n_searched: Number of characters of `text` that were searched for a place to cut, without success. It is not
            saved, and saves the search when a few more characters arrive.
    """

    state: RecurrentState | None = None
    overlap: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    context: str = ""
    position: int = 0
    n_tokens: int = 0
    n_segments: int = 0
    shown: list[ShownToken] = field(default_factory=list)
    n_searched: int = 0

    @property
    def n_characters(self) -> int:
        """Number of characters so far, `text` included."""
        return self.position + len(self.text)


class TextCutter:
    """Tokenizer of a text that arrives in parts: it takes tokens as soon as no later text can change them."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        cuts_anywhere = self._encode("a\na") == self._encode("a") + self._encode("\na")
        self.cut = BEFORE_WHITE_SPACE if cuts_anywhere else BEFORE_SPACE

    def take_settled_text(self, mark: Bookmark) -> None:
        """Move the tokens of whole words and sentences from the bookmark's text to its tokens."""
        end = self._end_of_words(mark.text)
        if end:
            mark.tokens += self.waiting_tokens(mark, end)
            mark.position += end
            mark.text, mark.context, mark.n_searched = mark.text[end:], "", 0
        self._take_sentences(mark)

    def waiting_tokens(self, mark: Bookmark, end: int | None = None) -> list[Token]:
        """Return the tokens of the bookmark's text up to `end`, which follows the bookmark's context."""
        text, behind = mark.text[:end], "" if end is None else mark.text[end : end + LOOKAHEAD]
        if not text:
            return []
        tokens = self.encoder.tokens(mark.context + text, behind)[self._n_tokens(mark.context) :]
        return [token.moved(mark.position - len(mark.context)) for token in tokens]

    def n_waiting_tokens(self, mark: Bookmark) -> int:
        """Return the number of `waiting_tokens`. It is known sooner than their characters."""
        return self._n_tokens(mark.context + mark.text) - self._n_tokens(mark.context)

    def _end_of_words(self, text: str) -> int:
        """Return the last index at which cutting the text does not change its ids."""
        found = self.cut.match(text)
        if found:
            return found.end()
        return len(text) if len(text) > LONGEST_WORD else 0

    def _take_sentences(self, mark: Bookmark) -> None:
        """Move the tokens of whole sentences from the text to the tokens, for scripts without white space."""
        if self._take_whole_sentences(mark):
            return
        # a word segmenter cuts by the whole sentence, so its words are never settled inside a sentence
        if not joins_words(self.encoder.tokenizer):
            while any(self._take_settled(mark, size) for size in self._sizes(mark)):
                pass
        mark.n_searched = len(mark.text)

    def _take_whole_sentences(self, mark: Bookmark) -> bool:
        """Move the tokens of whole sentences. Return True if there are any."""
        whole = mark.context + mark.text
        places = [found.start() for found in SENTENCE_CUT.finditer(whole, 0, max(0, len(whole) - LOOKAHEAD))]
        # characters that a check reads behind a place; more characters do not change its result
        n_behind = 2 * LOOKAHEAD
        first = len(mark.context) + max(1, mark.n_searched - n_behind)
        for place in reversed(places[-N_PLACES:]):
            if place < first:
                break
            start = max((it for it in places if it <= place - LOOKAHEAD), default=0)
            behind = whole[place : place + n_behind]
            texts = whole[:place], whole[:place] + behind, whole[start:place], whole[start:place] + behind
            ids, longer, context, both = self.encoder(texts)
            is_end = longer[: len(ids)] == ids and both[: len(context)] == context
            if is_end and both[len(context) :] == longer[len(ids) :]:
                self._cut(mark, whole, place, start, place + n_behind)
                return True
        return False

    def _sizes(self, mark: Bookmark) -> Iterator[int]:
        """Yield the numbers of first characters of the text in which no settled place was searched yet."""
        size = LONGEST_SENTENCE
        while size < len(mark.text):
            if size >= mark.n_searched:
                yield size
            size *= 2

    def _take_settled(self, mark: Bookmark, size: int) -> bool:
        """Move tokens of a long sentence's middle that no later text can change. Return True if there are any.

        The tokens stand in the first `size` characters of the text.
        """
        whole = mark.context + mark.text[:size]
        last = len(whole) - 2 * LOOKAHEAD
        start = max(0, last - LOOKAHEAD - CONTEXT)
        settled, ids = self._settled(whole)
        settled_part, ids_of_part = self._settled(whole[start:])
        for place in range(last, max(last - LOOKAHEAD, start), -1):
            before, context = self.encoder([whole[:place], whole[start:place]])
            are_settled = settled[: len(before)] == before and settled_part[: len(context)] == context
            if before and context and are_settled and ids[len(before) :] == ids_of_part[len(context) :]:
                self._cut(mark, mark.context + mark.text, place, start, len(whole))
                return True
        return False

    def _settled(self, text: str) -> tuple[list[int], list[int]]:
        """Return the first ids of the text that every longer text has too, and the ids of the text.

        A token has at most `LOOKAHEAD` characters. So the best tokens of any longer text go on from the best tokens of
        the text up to one of its last `LOOKAHEAD` places (Viterbi search of unigram models).
        """
        ids, *shorter = self.encoder([text[:end] for end in range(len(text), len(text) - LOOKAHEAD - 1, -1)])
        n_settled = 0
        for same in zip(ids, *shorter, strict=False):
            if len({*same}) > 1:
                break
            n_settled += 1
        return ids[:n_settled], ids

    def _cut(self, mark: Bookmark, whole: str, place: int, start: int, end: int) -> None:
        """Move the tokens in front of a place of the context and text; the new context begins at `start`.

        The characters up to `end` show whether a sentence ends at the place.
        """
        n_before = mark.position - len(mark.context)
        tokens = self.encoder.tokens(whole[:place], whole[place:end])[self._n_tokens(mark.context) :]
        mark.tokens += [token.moved(n_before) for token in tokens]
        mark.position = n_before + place
        mark.text, mark.context, mark.n_searched = whole[place:], whole[start:place], 0

    def _n_tokens(self, text: str) -> int:
        """Return the number of tokens of a text; 0 for an empty text, of which some tokenizers make a token."""
        return len(self._encode(text)) if text else 0

    def _encode(self, text: str) -> list[int]:
        return self.encoder([text])[0]
