"""bAbI questions about facts that are scattered, in order, among sentences of filler text.

The construction is that of BABILong (Kuratov et al., arXiv 2406.10149) over the tasks of bAbI (Weston et al., arXiv
1502.05698). Facts and filler text come from files. Words are the tokens. Every document is assembled anew.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, S facts, F tokens of all facts,
Q tokens of a question, M tokens of facts and question, C tokens in a document, V vocabulary.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from recurrent_bart.data.jsonl import jsonl_records
from recurrent_bart.data.words import SENTENCE_END
from recurrent_bart.model.loss import IGNORED
from recurrent_bart.studies.tasks.memory_tasks import FIRST_SYMBOL, MemoryTask

# id of unknown words; MARK has the same id, but bAbI does not use MARK
UNKNOWN = 3
SPLITS = ("train", "validation")
WORD = re.compile(r"\w+|[^\w\s]")
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Story:
    """Facts (one sentence each, in order), a question about the facts, and the answer, all as words.

    With `with_subjects` in `load_babi`, the answer starts with the subjects of the supporting facts.
    """

    facts: list[list[str]]
    question: list[str]
    answer: list[str]

    def length(self) -> int:
        """Return the number of words of facts and question, without filler."""
        return sum(map(len, self.facts)) + len(self.question)


class Vocabulary:
    """Mapping from words to ids: first the `needed` words of all stories, then the most frequent filler words.

    The vocabulary has at most `n_words` words, unless the stories alone have more.
    """

    def __init__(self, needed: Iterable[str], sentences: list[list[str]], n_words: int):
        frequent = Counter(itertools.chain.from_iterable(sentences)).most_common(n_words)
        needed = dict.fromkeys(needed)
        words = [*needed, *(word for word, _ in frequent if word not in needed)][: max(n_words, len(needed))]
        self.ids = {word: number for number, word in enumerate(words, start=FIRST_SYMBOL)}

    def encode(self, words: Iterable[str]) -> Tensor:
        """Return the ids of words; unknown words become `UNKNOWN`."""
        return torch.tensor([self.ids.get(word, UNKNOWN) for word in words], dtype=torch.long)

    def __len__(self) -> int:
        return FIRST_SYMBOL + len(self.ids)


@dataclass(frozen=True)
class Tables:
    """Stories and filler as ids, from which documents are assembled on any device. Stories ascend by length.

    Attributes:
        filler: All filler sentences, concatenated. After the last word, documents continue with the first word.
        starts: Start index of each filler sentence, for two passes through `filler`.
        lengths: Words of each story.
        facts: Words of all facts of each story, `(stories, F)`, padded.
        fact_numbers: Index of the fact that each word of `facts` belongs to; padding gets the largest index plus 1.
        is_fact: True where a story has the fact with this index, `(stories, S)`. The last column is for padding: False.
        questions: Words of each question, `(stories, Q)`, padded.
        question_lengths: Words of each question.
        answers: Answers, `(stories, T)`, padded with -100.
    """

    filler: Tensor
    starts: Tensor
    lengths: Tensor
    facts: Tensor
    fact_numbers: Tensor
    is_fact: Tensor
    questions: Tensor
    question_lengths: Tensor
    answers: Tensor

    @classmethod
    def build(cls, stories: list[Story], sentences: list[list[str]], vocabulary: Vocabulary) -> "Tables":
        """Encode stories and filler sentences."""
        stories = sorted(stories, key=Story.length)
        filler = vocabulary.encode(itertools.chain.from_iterable(sentences))
        starts = torch.tensor([0, *map(len, sentences[:-1])]).cumsum(0)
        n_facts = torch.tensor([len(story.facts) for story in stories])
        numbers = [torch.tensor([number for number, fact in enumerate(story.facts) for _ in fact]) for story in stories]

        def padded(texts: Iterable[Iterable[str]], padding: int = UNKNOWN) -> Tensor:
            return pad_sequence(list(map(vocabulary.encode, texts)), batch_first=True, padding_value=padding)

        return cls(
            filler=filler,
            starts=torch.cat([starts, starts + len(filler)]),
            lengths=torch.tensor([story.length() for story in stories]),
            facts=padded(itertools.chain.from_iterable(story.facts) for story in stories),
            fact_numbers=pad_sequence(numbers, batch_first=True, padding_value=int(n_facts.max())),
            is_fact=torch.arange(int(n_facts.max()) + 1) < n_facts.unsqueeze(1),
            questions=padded(story.question for story in stories),
            question_lengths=torch.tensor([len(story.question) for story in stories]),
            answers=padded((story.answer for story in stories), IGNORED),
        )

    def to(self, device: torch.device) -> "Tables":
        """Return a copy on a device."""
        return Tables(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


class Babi(MemoryTask):
    """Facts of a story, in order and at random sentence boundaries of a filler passage, then the question.

    A story longer than the document is never drawn. The words of each of the `groups` are permuted within the group,
    anew in every document.
    """

    def __init__(self, tables: Tables, vocabulary: Vocabulary, groups: Groups = ()):
        self.vocabulary = vocabulary
        self.groups = [vocabulary.encode(word for word in group if word in vocabulary.ids) for group in groups]
        self.lengths, self.longest_answer = tables.lengths, tables.answers.shape[1]
        self.has_equal_answers = bool((tables.answers != IGNORED).all())
        self.tables_on = functools.cache(tables.to)

    @property
    def vocab_size(self) -> int:
        """Number of ids: special ids and words."""
        return len(self.vocabulary)

    def target_length(self, n_segments: int) -> int:
        """Return the number of words of the longest answer."""
        return self.longest_answer

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        length = n_segments * segment_size
        n_fitting = int((self.lengths <= length).sum())
        if not n_fitting:
            raise ValueError(
                f"documents of {length} words are too short: the shortest story has {self.lengths[0]} words"
            )
        tables = self.tables_on(generator.device)
        drawn_B = torch.randint(n_fitting, (batch_size,), generator=generator, device=generator.device)
        input_ids = _documents(tables, drawn_B, length, generator)
        answers = tables.answers[drawn_B]
        if self.groups:
            input_ids, answers = self._renamed(generator, input_ids, answers)
        return input_ids.view(batch_size, n_segments, segment_size), answers

    def answer_places(self, segment_size: int) -> slice | None:
        """Return the positions of the question's last words, one per answer word. None if answers differ in length."""
        return slice(segment_size - self.longest_answer, segment_size) if self.has_equal_answers else None

    def _renamed(self, generator: Generator, *texts: Tensor) -> list[Tensor]:
        """Return texts `(B, ...)` with the words of each group permuted, one permutation per document."""
        device = generator.device
        names_BV = torch.arange(self.vocab_size, device=device).repeat(len(texts[0]), 1)
        for group in self.groups:
            order = torch.rand(len(names_BV), len(group), generator=generator, device=device).argsort(dim=1)
            names_BV[:, group.to(device)] = group.to(device)[order]
        return [text.where(text == IGNORED, names_BV.gather(1, text.clamp(min=0))) for text in texts]


def _documents(tables: Tables, drawn_B: Tensor, length: int, generator: Generator) -> Tensor:
    start_B, places_BS = _passages(tables, drawn_B, length, generator)
    numbers_BF, n_words_B = tables.fact_numbers[drawn_B], tables.question_lengths[drawn_B]
    # position of a word of a fact: number of filler words before the fact, plus number of earlier words of facts
    positions_BF = places_BS.gather(1, numbers_BF) + torch.arange(numbers_BF.shape[1], device=drawn_B.device)
    positions_BQ = length - n_words_B.unsqueeze(1) + torch.arange(tables.questions.shape[1], device=drawn_B.device)
    # padding is written to index `length`, which is cut off below
    positions_BM = torch.cat([positions_BF, positions_BQ], dim=1).clamp(max=length)
    words_BM = torch.cat([tables.facts[drawn_B], tables.questions[drawn_B]], dim=1)
    is_filler_BC = torch.ones(len(drawn_B), length + 1, dtype=torch.long, device=drawn_B.device)
    number_BC = is_filler_BC.scatter(1, positions_BM, 0).cumsum(dim=1) - 1
    documents_BC = tables.filler[(start_B.unsqueeze(1) + number_BC) % len(tables.filler)]
    return documents_BC.scatter(1, positions_BM, words_BM)[:, :length]


def _passages(tables: Tables, drawn_B: Tensor, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw the filler start of each document. Draw a sentence start, relative to that start, for each fact, ascending.

    Facts that a story does not have get the position `length`, outside the document.
    """
    is_fact_BS = tables.is_fact[drawn_B]
    draw = functools.partial(torch.randint, generator=generator, device=drawn_B.device)
    first_B = draw(len(tables.starts) // 2, drawn_B.shape)
    start_B = tables.starts[first_B]
    end_B = torch.searchsorted(tables.starts, start_B + length - tables.lengths[drawn_B], right=True)
    chosen_BS = draw(2**40, is_fact_BS.shape) % (end_B - first_B).unsqueeze(1)
    places_BS = tables.starts[first_B.unsqueeze(1) + chosen_BS] - start_B.unsqueeze(1)
    return start_B, places_BS.masked_fill(~is_fact_BS, length).sort(dim=1).values


# Loading takes seconds, so all runs of a process share the loaded tasks.
@functools.cache
def load_babi(
    task: str, facts: Path, filler: Path, n_words: int = 4096, with_subjects: bool = False, renamed: Groups = ()
) -> dict[str, Babi]:
    """Load a training task and a validation task, which share neither stories nor filler text.

    The vocabulary covers the training stories of all tasks, so a model can train on one task after another.

    Args:
        task: Name of the bAbI task, `"qa1"` to `"qa20"`.
        facts: Folder with `train.jsonl` and `validation.jsonl`, or `.jsonl.gz`. Records have `task`, `document` (one
            fact per line), `query` and `summary` (the answer). `with_subjects` needs `supporting_lines` too: indices,
            from 0, of the facts that imply the answer.
        filler: Folder with files of the same names. Records have `document`.
        n_words: Size of the vocabulary. The filler has many more words, so its rare words become `UNKNOWN`.
        with_subjects: Start answers with the subjects of the supporting facts that the question does not name. Measure
            `Accuracy.exact_match`: under teacher forcing, the first words of an answer reveal its last word.
        renamed: Groups of words that are permuted in every training document, so that names do not identify a story.

    Raises:
        ValueError: A file is missing or unreadable, or has no record of the task.
    """
    stories = {split: _stories(_file(facts, split), task, with_subjects) for split in SPLITS}
    sentences = {split: _sentences(_file(filler, split)) for split in SPLITS}
    vocabulary = Vocabulary(_story_words(_file(facts, "train")), sentences["train"], n_words)
    tables = {split: Tables.build(stories[split], sentences[split], vocabulary) for split in SPLITS}
    return {
        "train": Babi(tables["train"], vocabulary, renamed),
        "validation": Babi(tables["validation"], vocabulary),
    }


def words_of(text: str) -> list[str]:
    """Split text into words and punctuation marks in lower case."""
    return WORD.findall(text.lower())


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: {split}.jsonl and {split}.jsonl.gz are missing")


def _stories(file: Path, task: str, with_subjects: bool) -> list[Story]:
    records = [record for _, record in jsonl_records(file) if record.get("task") == task]
    if not records:
        raise ValueError(f"{file}: no record of task {task!r}")
    stories = [
        Story(
            facts=[words_of(line) for line in record["document"].splitlines()],
            question=words_of(record["query"]),
            answer=words_of(record["summary"]),
        )
        for record in records
    ]
    if not with_subjects:
        return stories
    supports = [record["supporting_lines"] for record in records]
    return [_with_subjects(story, numbers) for story, numbers in zip(stories, supports, strict=True)]


def _story_words(file: Path) -> Iterator[str]:
    for _, record in jsonl_records(file):
        for field in ("document", "query", "summary") if "task" in record else ():
            yield from words_of(record[field])


def _with_subjects(story: Story, supporting: list[int]) -> Story:
    """Prepend the subjects of the supporting facts to the answer. The subject is the first word of a fact."""
    subjects = dict.fromkeys(story.facts[number][0] for number in supporting)
    return replace(story, answer=[*(word for word in subjects if word not in story.question), *story.answer])


def _sentences(file: Path) -> list[list[str]]:
    texts = (record["document"] for _, record in jsonl_records(file))
    sentences = [words_of(sentence) for text in texts for sentence in SENTENCE_END.split(text)]
    sentences = [words for words in sentences if words]
    if not sentences:
        raise ValueError(f"{file}: no text")
    return sentences
