"""Questions about facts that are scattered, in order, among sentences of other text.

The construction is that of BABILong (Kuratov et al., arXiv 2406.10149) over the tasks of bAbI (Weston et al., arXiv
1502.05698). Both are read from files, words are the tokens, and every document is put together anew.

Shape suffixes: B documents, N segments, L tokens in a segment, T target length, S facts, F tokens of all facts,
Q tokens of a question, M tokens written, C tokens in a document.
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

# takes the place of marks, which are not used here
UNKNOWN = 3
SPLITS = ("train", "validation")
WORD = re.compile(r"\w+|[^\w\s]")
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Story:
    """Facts, a question about them, and its answer, in words.

    Attributes:
        facts: One sentence each, in order.
        question: What is asked after all of them.
        answer: What is right; with subjects, first whom the supporting facts are about.
    """

    facts: list[list[str]]
    question: list[str]
    answer: list[str]

    def length(self) -> int:
        """Words of a document without any other text."""
        return sum(map(len, self.facts)) + len(self.question)


class Vocabulary:
    """Ids of words: all that stories use, and the most frequent of other text.

    Args:
        needed: Those that all stories use.
        sentences: Other text to train on.
        n_words: Words at most; there are more only where stories alone have more.
    """

    def __init__(self, needed: Iterable[str], sentences: list[list[str]], n_words: int):
        frequent = Counter(itertools.chain.from_iterable(sentences)).most_common(n_words)
        needed = dict.fromkeys(needed)
        words = [*needed, *(word for word, _ in frequent if word not in needed)][: max(n_words, len(needed))]
        self.ids = {word: number for number, word in enumerate(words, start=FIRST_SYMBOL)}

    def encode(self, words: Iterable[str]) -> Tensor:
        """Ids of words, `UNKNOWN` for those that have none."""
        return torch.tensor([self.ids.get(word, UNKNOWN) for word in words], dtype=torch.long)

    def __len__(self) -> int:
        return FIRST_SYMBOL + len(self.ids)


@dataclass(frozen=True)
class Tables:
    """Stories and other text in ids, to be put together on any device; stories by length, the shortest first.

    Attributes:
        filler: All sentences of other text, one behind the other; after the last comes the first again.
        starts: Where sentences start, twice through the text.
        lengths: Words of each story.
        facts: Those of all its facts, `(stories, F)`.
        fact_numbers: Which fact each of them belongs to; behind the last, one that is none.
        is_fact: Which facts it has, `(stories, S)`; of the last none has any.
        questions: Its question, `(stories, Q)`.
        question_lengths: Words of its question.
        answers: Its answer, `(stories, T)`, -100 behind it.
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
        """Encode stories and the sentences of other text."""
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
        """The same on a device."""
        return Tables(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


class Babi(MemoryTask):
    """A story's facts, in order but anywhere in a passage of other text, and its question at the end.

    Args:
        tables: Stories to draw from and other text. Stories that are longer than a document are not drawn for it.
        vocabulary: Ids of words.
        groups: Words that take each other's places, others in every document.
    """

    def __init__(self, tables: Tables, vocabulary: Vocabulary, groups: Groups = ()):
        self.vocabulary = vocabulary
        self.groups = [vocabulary.encode(word for word in group if word in vocabulary.ids) for group in groups]
        self.lengths, self.longest_answer = tables.lengths, tables.answers.shape[1]
        self.has_equal_answers = bool((tables.answers != IGNORED).all())
        self.tables_on = functools.cache(tables.to)

    @property
    def vocab_size(self) -> int:
        """Special ids and words."""
        return len(self.vocabulary)

    def target_length(self, n_segments: int) -> int:
        """Words of the longest answer."""
        return self.longest_answer

    def batch(self, generator: Generator, batch_size: int, n_segments: int, segment_size: int) -> tuple[Tensor, Tensor]:
        """See MemoryTask."""
        length = n_segments * segment_size
        n_fitting = int((self.lengths <= length).sum())
        if not n_fitting:
            raise ValueError(
                f"a document of {length} words has no room for a story: the shortest has {self.lengths[0]}"
            )
        tables = self.tables_on(generator.device)
        drawn_B = torch.randint(n_fitting, (batch_size,), generator=generator, device=generator.device)
        input_ids = _documents(tables, drawn_B, length, generator)
        answers = tables.answers[drawn_B]
        if self.groups:
            input_ids, answers = self._renamed(generator, input_ids, answers)
        return input_ids.view(batch_size, n_segments, segment_size), answers

    def answer_places(self, segment_size: int) -> slice | None:
        """The last words of the question, as many as every answer has."""
        return slice(segment_size - self.longest_answer, segment_size) if self.has_equal_answers else None

    def _renamed(self, generator: Generator, *texts: Tensor) -> list[Tensor]:
        """Texts `(B, ...)` in which, document by document, the words of a group have changed places."""
        device = generator.device
        names_BV = torch.arange(self.vocab_size, device=device).repeat(len(texts[0]), 1)
        for group in self.groups:
            order = torch.rand(len(names_BV), len(group), generator=generator, device=device).argsort(dim=1)
            names_BV[:, group.to(device)] = group.to(device)[order]
        return [text.where(text == IGNORED, names_BV.gather(1, text.clamp(min=0))) for text in texts]


def _documents(tables: Tables, drawn_B: Tensor, length: int, generator: Generator) -> Tensor:
    """Documents `(B, C)` of so many words, of the stories with these numbers."""
    start_B, places_BS = _passages(tables, drawn_B, length, generator)
    numbers_BF, n_words_B = tables.fact_numbers[drawn_B], tables.question_lengths[drawn_B]
    # in front of a fact's word stand the passage up to its fact's place and the facts' words before it
    positions_BF = places_BS.gather(1, numbers_BF) + torch.arange(numbers_BF.shape[1], device=drawn_B.device)
    positions_BQ = length - n_words_B.unsqueeze(1) + torch.arange(tables.questions.shape[1], device=drawn_B.device)
    # what is padding comes to lie behind the document
    positions_BM = torch.cat([positions_BF, positions_BQ], dim=1).clamp(max=length)
    words_BM = torch.cat([tables.facts[drawn_B], tables.questions[drawn_B]], dim=1)
    is_filler_BC = torch.ones(len(drawn_B), length + 1, dtype=torch.long, device=drawn_B.device)
    number_BC = is_filler_BC.scatter(1, positions_BM, 0).cumsum(dim=1) - 1
    documents_BC = tables.filler[(start_B.unsqueeze(1) + number_BC) % len(tables.filler)]
    return documents_BC.scatter(1, positions_BM, words_BM)[:, :length]


def _passages(tables: Tables, drawn_B: Tensor, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Where the passage of each document starts, and each fact's place in it, counted from there.

    A place is where a sentence starts; they ascend. Of facts that a story does not have it is behind the document.
    """
    is_fact_BS = tables.is_fact[drawn_B]
    draw = functools.partial(torch.randint, generator=generator, device=drawn_B.device)
    first_B = draw(len(tables.starts) // 2, drawn_B.shape)
    start_B = tables.starts[first_B]
    end_B = torch.searchsorted(tables.starts, start_B + length - tables.lengths[drawn_B], right=True)
    chosen_BS = draw(2**40, is_fact_BS.shape) % (end_B - first_B).unsqueeze(1)
    places_BS = tables.starts[first_B.unsqueeze(1) + chosen_BS] - start_B.unsqueeze(1)
    return start_B, places_BS.masked_fill(~is_fact_BS, length).sort(dim=1).values


# read once, for it takes seconds, by all runs of a process
@functools.cache
def load_babi(
    task: str, facts: Path, filler: Path, n_words: int = 4096, with_subjects: bool = False, renamed: Groups = ()
) -> dict[str, Babi]:
    """A task to train on and one to test on, of other stories and other text.

    Their vocabulary is that of all tasks' stories to train on: a model may be trained on one task after another.

    Args:
        task: `"qa1"` to `"qa20"`.
        facts: Folder with `train.jsonl` and `validation.jsonl`, or `.jsonl.gz`, of records with `task`, `document`
            (facts, one a line), `query`, `summary` (the answer), and `supporting_lines` (of the facts that it follows
            from, counted from 0) where subjects are wanted.
        filler: Folder with such files, of records with `document`.
        n_words: Words of the vocabulary; other text has many more.
        with_subjects: Answers begin with whom the supporting facts are about, unless the question says so: who has the
            football, then where it is. Such an answer is right as a whole, which `Accuracy.exact_match` counts: under
            teacher forcing its first words would give the last one away.
        renamed: Groups of words that take each other's places, others in every document to train on: whom a story is
            about does not tell which one it is.

    Raises:
        ValueError: A file is missing or unreadable, or has no such task.
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
    """Words and punctuation marks, in lower case."""
    return WORD.findall(text.lower())


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: there is no {split}.jsonl or {split}.jsonl.gz")


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
    """Subjects stand first in their facts, and each once in the answer."""
    subjects = dict.fromkeys(story.facts[number][0] for number in supporting)
    return replace(story, answer=[*(word for word in subjects if word not in story.question), *story.answer])


def _sentences(file: Path) -> list[list[str]]:
    texts = (record["document"] for _, record in jsonl_records(file))
    sentences = [words_of(sentence) for text in texts for sentence in SENTENCE_END.split(text)]
    sentences = [words for words in sentences if words]
    if not sentences:
        raise ValueError(f"{file}: no text")
    return sentences
