"""Position in a text that is being read, and the tokens of this text that no later text can change."""

import re
from dataclasses import dataclass, field

import regex

from recurrent_bart.data.text_encoder import TextEncoder, Token
from recurrent_bart.data.word_segmenter import joins_words
from recurrent_bart.inference.shown_tokens import ShownToken
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState

# characters without white space after which a text is cut inside a word, which may change a token or two
LONGEST_WORD = 2**20
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
            mark.text, mark.context = mark.text[end:], ""
        self._take_sentences(mark)

    def waiting_tokens(self, mark: Bookmark, end: int | None = None) -> list[Token]:
        """Return the tokens of the bookmark's text up to `end`, which follows the bookmark's context."""
        text, behind = mark.text[:end], "" if end is None else mark.text[end : end + LOOKAHEAD]
        if not text:
            return []
        n_context = len(self._encode(mark.context)) if mark.context else 0
        tokens = self.encoder.tokens(mark.context + text, behind)[n_context:]
        return [token.moved(mark.position - len(mark.context)) for token in tokens]

    def _end_of_words(self, text: str) -> int:
        """Return the last index at which cutting the text does not change its ids."""
        found = self.cut.match(text)
        if found:
            return found.end()
        return len(text) if len(text) > LONGEST_WORD else 0

    def _take_sentences(self, mark: Bookmark) -> None:
        """Move the tokens of whole sentences from the text to the tokens, for scripts without white space."""
        whole = mark.context + mark.text
        places = [found.start() for found in SENTENCE_CUT.finditer(whole, 0, max(0, len(whole) - LOOKAHEAD))]
        for place in reversed(places[-N_PLACES:]):
            if place <= len(mark.context):
                break
            start = max((it for it in places if it <= place - LOOKAHEAD), default=0)
            behind = whole[place : place + 2 * LOOKAHEAD]
            texts = mark.context, whole[:place], whole[:place] + behind, whole[start:place], whole[start:place] + behind
            old, ids, longer, context, both = self.encoder(texts)
            is_end = longer[: len(ids)] == ids and both[: len(context)] == context
            if is_end and both[len(context) :] == longer[len(ids) :]:
                self._take(mark, whole[:place], behind, len(old))
                mark.text, mark.context = whole[place:], whole[start:place]
                return
        # a word segmenter cuts by the whole sentence, so its words are never settled inside a sentence
        if not joins_words(self.encoder.tokenizer):
            while len(mark.text) > LONGEST_SENTENCE and self._take_settled(mark):
                pass

    def _take(self, mark: Bookmark, text: str, behind: str, n_context: int) -> None:
        """Add the tokens of `text`, which begins with the bookmark's context, without the context's `n_context`."""
        n_before = mark.position - len(mark.context)
        mark.tokens += [token.moved(n_before) for token in self.encoder.tokens(text, behind)[n_context:]]
        mark.position = n_before + len(text)

    def _take_settled(self, mark: Bookmark) -> bool:
        """Move tokens of a long sentence's middle that no later text can change. Return True if there are any."""
        rest_of_text = mark.text[LONGEST_SENTENCE:]
        whole = mark.context + mark.text[:LONGEST_SENTENCE]
        for place in range(len(whole) - 2 * LOOKAHEAD, len(whole) - 3 * LOOKAHEAD, -1):
            start = max(0, place - CONTEXT)
            ids, rest = self._settled(whole, place)
            context, same_rest = self._settled(whole[start:], place - start)
            if ids and context and rest == same_rest:
                self._take(mark, whole[:place], whole[place:], len(self._encode(mark.context)))
                mark.text, mark.context = whole[place:] + rest_of_text, whole[start:place]
                return True
        return False

    def _settled(self, text: str, place: int) -> tuple[list[int], list[int]]:
        """Return the ids before and after a place, and none before it if an earlier end of the text changes them.

        A token has at most `LOOKAHEAD` characters. So the best tokens of any longer text go on from the best tokens of
        the text up to one of its last `LOOKAHEAD` places (Viterbi search of unigram models).
        """
        ends = range(len(text), len(text) - LOOKAHEAD - 1, -1)
        ids, whole, *shorter = self.encoder([text[:place], *(text[:end] for end in ends)])
        is_settled = all(other[: len(ids)] == ids for other in (whole, *shorter))
        return ids if is_settled else [], whole[len(ids) :]

    def _encode(self, text: str) -> list[int]:
        return self.encoder([text])[0]
