"""Questions about facts that are scattered, in order, among sentences of other text.

The construction is that of BABILong (Kuratov et al., arXiv 2406.10149) over the tasks of bAbI (Weston et al., arXiv
1502.05698). Both are read from files, words are the tokens, and every document is put together anew.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from recurrent_bart.data.jsonl import jsonl_records
from recurrent_bart.data.memory_tasks import FIRST_SYMBOL, MemoryTask
from recurrent_bart.targets import IGNORED

# takes the place of marks, which are not used here
UNKNOWN = 3
SPLITS = ("train", "validation")
WORD = re.compile(r"\w+|[^\w\s]")
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|\n+")

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Story:
    """Facts, a question about them, and its answer, in words.

    Attributes:
        facts: One sentence each, in order.
        question: What is asked after all of them.
        answer: What is right.
    """

    facts: list[list[str]]
    question: list[str]
    answer: list[str]

    def words(self) -> Iterator[str]:
        """All of them."""
        return itertools.chain(*self.facts, self.question, self.answer)

    def length(self) -> int:
        """Words of a document without any other text."""
        return sum(map(len, self.facts)) + len(self.question)


class Vocabulary:
    """Ids of words: all that stories use, and the most frequent of other text.

    Args:
        stories: Stories to train on.
        sentences: Other text to train on.
        n_words: Words at most; there are more only where stories alone have more.
    """

    def __init__(self, stories: list[Story], sentences: list[list[str]], n_words: int):
        needed = Counter(word for story in stories for word in story.words())
        frequent = Counter(itertools.chain.from_iterable(sentences)).most_common(n_words)
        words = [*needed, *(word for word, _ in frequent if word not in needed)][: max(n_words, len(needed))]
        self.ids = {word: number for number, word in enumerate(words, start=FIRST_SYMBOL)}

    def encode(self, words: Iterable[str]) -> Ids:
        """Ids of words, `UNKNOWN` for those that have none."""
        return np.array([self.ids.get(word, UNKNOWN) for word in words], dtype=np.int64)

    def __len__(self) -> int:
        return FIRST_SYMBOL + len(self.ids)


class Filler:
    """Text that means nothing to the question.

    Args:
        sentences: Its sentences, in ids; after the last comes the first again.
    """

    def __init__(self, sentences: list[Ids]):
        self.ids = np.concatenate(sentences)
        starts = np.cumsum([0, *map(len, sentences[:-1])])
        self.starts = np.concatenate([starts, starts + len(self.ids)])
        self.n_sentences = len(sentences)

    def passage(self, random: np.random.Generator, length: int) -> tuple[Ids, Ids]:
        """So many tokens from the start of some sentence on, and where in them sentences start."""
        first = random.integers(self.n_sentences)
        start = self.starts[first]
        end = np.searchsorted(self.starts, start + length, side="right")
        return self.ids[np.arange(start, start + length) % len(self.ids)], self.starts[first:end] - start


class Babi(MemoryTask):
    """A story's facts, in order but anywhere in a passage of other text, and its question at the end.

    Args:
        stories: Stories to draw from. Those that are longer than a document are not drawn for it.
        filler: Other text.
        vocabulary: Ids of words.
    """

    def __init__(self, stories: list[Story], filler: Filler, vocabulary: Vocabulary):
        self.filler, self.vocabulary = filler, vocabulary
        stories = sorted(stories, key=Story.length)
        self.lengths = np.array([story.length() for story in stories])
        self.facts = [vocabulary.encode(itertools.chain.from_iterable(story.facts)) for story in stories]
        self.fact_lengths = [np.array([len(fact) for fact in story.facts]) for story in stories]
        self.questions = [vocabulary.encode(story.question) for story in stories]
        answers = [torch.from_numpy(vocabulary.encode(story.answer)) for story in stories]
        self.answers = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)

    @property
    def vocab_size(self) -> int:
        """Special ids and words."""
        return len(self.vocabulary)

    def target_length(self, n_segments: int) -> int:
        """Words of the longest answer."""
        return self.answers.shape[1]

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        length = n_segments * segment_size
        n_fitting = int(np.searchsorted(self.lengths, length, side="right"))
        if not n_fitting:
            raise ValueError(
                f"a document of {length} words has no room for a story: the shortest has {self.lengths[0]}"
            )
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        random = np.random.default_rng(int(seed))
        drawn = random.integers(n_fitting, size=batch_size)
        documents = np.stack([self._document(random, story, length) for story in drawn])
        input_ids = torch.from_numpy(documents).view(batch_size, n_segments, segment_size)
        return input_ids.to(generator.device), self.answers[torch.from_numpy(drawn)].to(generator.device)

    def _document(self, random: np.random.Generator, story: int, length: int) -> Ids:
        facts, fact_lengths = self.facts[story], self.fact_lengths[story]
        passage, starts = self.filler.passage(random, length - self.lengths[story])
        places = np.sort(random.choice(starts, size=len(fact_lengths)))
        return np.concatenate([np.insert(passage, np.repeat(places, fact_lengths), facts), self.questions[story]])


def load_babi(task: str, facts: Path, filler: Path, n_words: int = 4096) -> dict[str, Babi]:
    """A task to train on and one to test on, of other stories and other text, with the first one's vocabulary.

    Args:
        task: `"qa1"` to `"qa20"`.
        facts: Folder with `train.jsonl` and `validation.jsonl`, or `.jsonl.gz`, of records with `task`, `document`
            (facts, one a line), `query` and `summary` (the answer).
        filler: Folder with such files, of records with `document`.
        n_words: Words of the vocabulary; other text has many more.

    Raises:
        ValueError: A file is missing or unreadable, or has no such task.
    """
    stories = {split: _stories(_file(facts, split), task) for split in SPLITS}
    sentences = {split: _sentences(_file(filler, split)) for split in SPLITS}
    vocabulary = Vocabulary(stories["train"], sentences["train"], n_words)
    return {
        split: Babi(stories[split], Filler([vocabulary.encode(words) for words in sentences[split]]), vocabulary)
        for split in SPLITS
    }


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return WORD.findall(text.lower())


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: there is no {split}.jsonl or {split}.jsonl.gz")


def _stories(file: Path, task: str) -> list[Story]:
    records = [record for _, record in jsonl_records(file) if record.get("task") == task]
    if not records:
        raise ValueError(f"{file}: no record of task {task!r}")
    return [
        Story(
            facts=[words_of(line) for line in record["document"].splitlines()],
            question=words_of(record["query"]),
            answer=words_of(record["summary"]),
        )
        for record in records
    ]


def _sentences(file: Path) -> list[list[str]]:
    texts = (record["document"] for _, record in jsonl_records(file))
    sentences = [words_of(sentence) for text in texts for sentence in SENTENCE_END.split(text)]
    sentences = [words for words in sentences if words]
    if not sentences:
        raise ValueError(f"{file}: no text")
    return sentences
