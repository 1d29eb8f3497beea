"""Text encoding that never produces a special token from the content of a text."""

import bisect
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.gap_sentences import GAP
from recurrent_bart.data.tokenizer import special_tokens_between
from recurrent_bart.data.word_segmenter import WordSegmenter, join_words, joins_words, segmenter_of
from recurrent_bart.data.words import CLOSED_BY, SENTENCE_END

# Prefix of a special token's replacement name. No text contains this sequence of Unicode noncharacters.
UNSPEAKABLE = "\ufdd0\ufdd1\ufdd2"
# brackets that belong to the sentence before them
CLOSING = frozenset(CLOSED_BY.values())


class Token(NamedTuple):
    """Token of a text, and the characters that it stands for, without white space around them.

    Attributes:
        start: Index of the first character; -1 for special tokens, and for slow tokenizers.
        end: Index behind the last character.
        ends_passage: True for the last token of a sentence or line.
    """

    id: int
    start: int = -1
    end: int = -1
    ends_passage: bool = False

    def moved(self, n_characters: int) -> "Token":
        """Return the token of a text that has more characters in front."""
        return self if self.start < 0 else self._replace(start=self.start + n_characters, end=self.end + n_characters)


class TextEncoder:
    """Encoder that treats `"</s>"` or `"<pad>"` in a text as ordinary characters, not as special tokens.

    A gap (placeholder of a sentence that `gap_sentence_rows` removed) becomes the mask token. The tokenizer, fast or
    slow, is not changed. If a word segmenter is saved with the tokenizer, it segments the texts first, large ones in
    `n_processes` processes. Raise ValueError if this segmenter is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_processes: int = 1):
        self.tokenizer = tokenizer
        name = segmenter_of(tokenizer)
        self.segmenter = None if name == "none" else WordSegmenter(name, n_processes)
        is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        self._encode = _FastEncoder(tokenizer) if is_fast else _SlowEncoder(tokenizer)
        self.mask_token_id = getattr(tokenizer, "mask_token_id", None)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        parts = [self._between_gaps(text) for text in texts]
        flat = [part for own in parts for part in own]
        encoded = iter(self._encode(self.segmenter(flat) if self.segmenter else flat))
        return [self._join([next(encoded) for _ in own]) for own in parts]

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each question with its separator; empty for a blank question.

        White space around a question does not change its ids.
        """
        stripped = [text.strip() for text in texts]
        if not any(stripped):
            return [[] for _ in texts]
        separator = special_tokens_between(self.tokenizer)
        # Some tokenizers make a token of an empty text.
        encoded = iter(self([text for text in stripped if text]))
        found = [next(encoded) if text else [] for text in stripped]
        return [[*ids, *separator] if ids else [] for ids in found]

    def tokens(self, text: str, behind: str = "") -> list[Token]:
        """Return the tokens of a text with their characters; `behind` is text that may show the end of a sentence.

        Slow tokenizers do not tell the characters.
        """
        if not isinstance(self._encode, _FastEncoder):
            return [Token(id) for id in self([text])[0]]
        found, begin = [], 0
        for number, part in enumerate(self._between_gaps(text)):
            if number:
                begin = text.index(GAP, begin) + 1
                assert self.mask_token_id is not None
                found.append(Token(self.mask_token_id, begin - 1, begin))
            segmented = self.segmenter([part])[0] if self.segmenter else part
            places = _places(segmented, part)
            for id, (start, end) in self._encode.spans(segmented):
                start, end = _without_space(part, places[start], places[end])
                # at a text's beginning, the mark of a space seems to have the first letter
                end = start if id in self._encode.space_ids else end
                found.append(Token(id, begin + start, begin + end))
        return _with_passages(found, text, behind)

    def require_characters(self) -> None:
        """Raise ValueError if the tokenizer does not tell the characters of its tokens."""
        if not isinstance(self._encode, _FastEncoder):
            name = type(self.tokenizer).__name__
            raise ValueError(f"citations: {name} does not tell the characters of its tokens; use a fast tokenizer")

    def _between_gaps(self, text: str) -> list[str]:
        if self.mask_token_id is None:
            return [text.replace(GAP, "<mask>")]
        *before, last = text.split(GAP)
        # BART's mask token includes the space before it.
        return [*(part.rstrip() for part in before), last]

    def _join(self, parts: list[list[int]]) -> list[int]:
        mask = [] if self.mask_token_id is None else [self.mask_token_id]
        return parts[0] + [id for part in parts[1:] for id in (*mask, *part)]


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Return the text of ids without special tokens, and without the spaces between segmented Japanese words."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return join_words(text) if joins_words(tokenizer) else text


def _places(segmented: str, text: str) -> Sequence[int]:
    """Return the index in `text` of each character of `segmented`, which has more spaces, and of its end."""
    if segmented == text:
        return range(len(text) + 1)
    found, place = [], 0
    for character in segmented:
        found.append(place)
        place += place < len(text) and text[place] == character
    return [*found, len(text)]


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def _with_passages(tokens: list[Token], text: str, behind: str) -> list[Token]:
    """Set `ends_passage` of the last token before each end of a sentence or line.

    Unlike in `sentence_ends`, quotes do not matter: their end may be far away in a text that still arrives.
    """
    starts, last, whole = [token.start for token in tokens], set(), text + behind
    for boundary in SENTENCE_END.finditer(whole):
        end = boundary.start()
        if end <= len(text) and whole[end : end + 1] not in CLOSING:
            while end and whole[end - 1].isspace():
                end -= 1
            last.add(bisect.bisect_left(starts, end) - 1)
    return [token._replace(ends_passage=True) if number in last else token for number, token in enumerate(tokens)]


class _FastEncoder:
    """Copy of a fast tokenizer whose special tokens have names that occur in no text.

    `split_special_tokens` is not enough: a unigram vocabulary contains `</s>` as an ordinary piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        special = {*tokenizer.all_special_tokens}
        special |= {token["content"] for token in content["added_tokens"] if token["special"]}
        spelling = {token: f"{UNSPEAKABLE}{number}" for number, token in enumerate(sorted(special))}
        for token in content["added_tokens"]:
            token["content"] = spelling.get(token["content"], token["content"])
        content |= {"model": _respelled(content["model"], spelling), "post_processor": None}
        content |= {"truncation": None, "padding": None}
        self.backend = Tokenizer.from_str(json.dumps(content))
        self.space_ids = frozenset(id for token, id in self.backend.get_vocab().items() if not token.strip("▁"))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def spans(self, text: str) -> Iterable[tuple[int, tuple[int, int]]]:
        """Return the id of each token, and the start and end of its characters."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return zip(encoding.ids, encoding.offsets, strict=True)


def _respelled(model: dict[str, Any], spelling: dict[str, str]) -> dict[str, Any]:
    """Return a copy of a tokenizer's model with some tokens renamed."""
    if isinstance(model["vocab"], list):
        return model | {"vocab": [[spelling.get(token, token), score] for token, score in model["vocab"]]}
    changed = model | {"vocab": {spelling.get(token, token): number for token, number in model["vocab"].items()}}
    if model.get("unk_token") in spelling:
        changed["unk_token"] = spelling[model["unk_token"]]
    if "merges" in model:
        changed["merges"] = [merge for merge in model["merges"] if not _makes(merge, spelling)]
    return changed


def _makes(merge: str | list[str], tokens: dict[str, str]) -> bool:
    """Return True if a byte-pair merge produces or uses one of the tokens."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return bool(tokens.keys() & {first, second, first + second})


class _SlowEncoder:
    """Slow tokenizer that encodes a text in parts if the text contains a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.forbidden = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        # Cut after the first character of each special token.
        cuts = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokenizer.all_special_tokens]
        self.cut = re.compile("|".join(cuts) or "(?!)")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenize(texts)
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self.cut.search(text) or self.forbidden & {*ids}:
                encoded[number] = [id for part in self._tokenize(self.cut.split(text)) for id in part]
        return [[id for id in ids if id not in self.forbidden] for ids in encoded]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False suppresses the warning about texts longer than the position table.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
