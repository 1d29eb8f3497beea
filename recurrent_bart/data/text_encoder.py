"""Text encoding that never produces a special token from the content of a text."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recurrent_bart.data.gap_sentences import GAP
from recurrent_bart.data.tokenizer import special_tokens_between
from recurrent_bart.data.word_segmenter import WordSegmenter, join_words, joins_words, segmenter_of

# Prefix of a special token's replacement name. No text contains this sequence of Unicode noncharacters.
UNSPEAKABLE = "\ufdd0\ufdd1\ufdd2"


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

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


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
