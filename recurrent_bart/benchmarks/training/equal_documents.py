"""Random documents of equal length, and a tokenizer with one token per word, for the training benchmark."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from recurrent_bart.data.tokenizer import MASK, SPECIAL, save_tokenizer, with_special_tokens

N_VALIDATION = 8


@dataclass(frozen=True)
class EqualDocuments:
    """Number and length of documents. Lengths exclude special tokens. `vocab_size` includes special tokens."""

    n_documents: int
    n_tokens: int
    n_target_tokens: int
    vocab_size: int

    def write(self, folder: Path) -> None:
        """Write `train.jsonl`, `validation.jsonl` and `tokenizer/` into a folder. The content is always the same."""
        folder.mkdir(parents=True, exist_ok=True)
        words = self.words()
        save_tokenizer(with_special_tokens(word_tokenizer(words)), folder / "tokenizer")
        choice = random.Random(0)
        for split, count in (("train", self.n_documents), ("validation", N_VALIDATION)):
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for number in range(count):
                    text, summary = (choice.choices(words, k=n) for n in (self.n_tokens, self.n_target_tokens))
                    record = {"id": f"{split}-{number}", "document": " ".join(text), "summary": " ".join(summary)}
                    file.write(json.dumps(record) + "\n")

    def words(self) -> list[str]:
        """Return one word per id that is not a special token."""
        return [f"w{number}" for number in range(self.vocab_size - len(SPECIAL) - 1)]


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Build a tokenizer with one id per word, after the special tokens. A text of n words has n tokens."""
    ids = {word: number for number, word in enumerate([*SPECIAL.values(), MASK, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
