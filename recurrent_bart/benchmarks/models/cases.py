"""Benchmark cases and suites of cases."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recurrent_bart.data.rows import TASKS
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS

MODELS = {"ours": "ours", "rmt": "RMT on BART", "bart": "BART, full attention", "led": "LED", "longt5": "LongT5"}
# training: passes and optimizer step; passes: forward and backward pass of one micro-batch; inference: the encoder;
# generation: the decoder
WORKS = ("training", "passes", "inference", "generation")
SUITES = ("quick", "grid", "headline", "memory")
SCHEDULES = ("sequential", "wavefront", "auto")


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        model: One of `MODELS`.
        n_segments: Segments in each document.
        work: One of `WORKS`.
        batch_size: Number of documents.
        task: `"document"`, or `"sections"` (a target per segment) for our model.
        bptt_depth: Segment boundaries that the gradient crosses in recurrent models; -1: all.
        checkpointing: One of `CHECKPOINTING_GRAINS`; the other models support `"none"` and `"layer"`.
        schedule: Schedule of our model.
    """

    model: str
    n_segments: int
    work: str = "training"
    batch_size: int = 1
    task: str = "document"
    bptt_depth: int = -1
    checkpointing: str = "none"
    schedule: str = "auto"

    def label(self) -> str:
        """Return the model's name and its settings, without the documents' size."""
        parts = [MODELS[self.model]]
        if self.model == "ours" and self.work != "generation":
            parts.append(self.schedule)
        if self.work in ("training", "passes"):
            if self.task != "document":
                parts.append("target per segment")
            if self.model in ("ours", "rmt") and self.bptt_depth != -1:
                parts.append(f"bptt_depth {self.bptt_depth}")
            if self.checkpointing != "none":
                parts.append(f"{self.checkpointing} checkpointing")
        return ", ".join(parts)


@dataclass(frozen=True)
class Group:
    """Named cases that are compared, and therefore measured in turns. Tables keep the order of the cases."""

    name: str
    cases: tuple[Case, ...]


def build_suite(
    name: str, batch_sizes: Sequence[int], numbers: Sequence[int], schedules: Sequence[str] = SCHEDULES
) -> list[Group]:
    """Build the groups of one of `SUITES`.

    `"quick"` has every model and every kind of work on short documents. `"headline"` has the project's goals. `"grid"`
    has every model by number of documents (`batch_sizes`) and segments (`numbers`). `"memory"` has the memory of our
    model's passes by target, `bptt_depth` and checkpointing. `schedules` of our model apply to the last two.
    """
    if name == "quick":
        return quick()
    if name == "headline":
        return headline()
    return (grid if name == "grid" else memory)(batch_sizes, numbers, schedules)


def grid(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Build training with every checkpointing, and inference, of every model."""
    groups = []
    for batch_size, n_segments in itertools.product(batch_sizes, numbers):
        ours = [
            Case("ours", n_segments, batch_size=batch_size, schedule=schedule, checkpointing=grain)
            for schedule, grain in itertools.product(schedules, CHECKPOINTING_GRAINS)
        ]
        others = [
            Case(model, n_segments, batch_size=batch_size, checkpointing=grain)
            for model, grain in itertools.product(list(MODELS)[1:], ("none", "layer"))
        ]
        name = f"{batch_size}x{n_segments}"
        groups.append(Group(f"training-{name}", (*ours, *others)))
        groups.append(Group(f"inference-{name}", tuple(readers(n_segments, schedules, batch_size))))
    return groups


def quick() -> list[Group]:
    """Build training at two lengths and inference of every model, and generation."""
    cases = []
    for n_segments in (1, 4):
        cases += [Case("ours", n_segments, schedule=schedule) for schedule in SCHEDULES]
        cases.append(Case("ours", n_segments, checkpointing="segment"))
        cases += [Case(model, n_segments) for model in list(MODELS)[1:]]
        cases.append(Case("led", n_segments, checkpointing="layer"))
    return [Group("length", tuple(cases)), Group("inference", tuple(readers(4, SCHEDULES))), generation()]


def generation() -> Group:
    """Build generation with our decoder and BART's, from equal context lengths, for 1 and 16 documents."""
    return Group(
        "generation",
        tuple(Case(model, 1, "generation", size) for size, model in itertools.product((1, 16), ("ours", "bart"))),
    )


def readers(n_segments: int, schedules: Sequence[str], batch_size: int = 1) -> list[Case]:
    """Build inference of every model's encoder."""
    ours = [Case("ours", n_segments, "inference", batch_size, schedule=schedule) for schedule in schedules]
    return ours + [Case(model, n_segments, "inference", batch_size) for model in list(MODELS)[1:]]


def headline() -> list[Group]:
    """Build one long document, full batches with and without checkpointing, inference, length and generation."""
    one = [
        Case("ours", 32, schedule="sequential"),
        *(Case("ours", 32, checkpointing=grain) for grain in CHECKPOINTING_GRAINS),
        Case("rmt", 32),
        Case("rmt", 32, checkpointing="layer"),
        Case("led", 32),
        Case("led", 32, checkpointing="layer"),
        Case("longt5", 32),
        Case("longt5", 32, checkpointing="layer"),
        Case("bart", 32),
        Case("bart", 32, checkpointing="layer"),
    ]
    batches = [Case("ours", 8, batch_size=16, schedule=schedule) for schedule in SCHEDULES]
    batches += [Case("rmt", 8, batch_size=16), Case("led", 8, batch_size=16), Case("bart", 2, batch_size=32)]
    checkpointed = [
        Case("ours", 32, batch_size=16, schedule=schedule, checkpointing=grain)
        for schedule, grain in itertools.product(SCHEDULES, CHECKPOINTING_GRAINS[1:])
    ]
    checkpointed += [Case(model, 32, batch_size=16, checkpointing="layer") for model in ("rmt", "led")]
    return [
        Group("one-document", tuple(one)),
        Group("batch", tuple(batches)),
        Group("batch-checkpointed", tuple(checkpointed)),
        Group("inference", tuple(readers(128, SCHEDULES))),
        Group("length", tuple(lengths([2, 8, 32, 64, 128, 256, 512]))),
        generation(),
    ]


def lengths(numbers: Iterable[int]) -> list[Case]:
    """Build models by document length: recurrent ones with bptt_depth 2, the rest up to LED's last position."""
    cases = []
    for n_segments in numbers:
        cases += [Case("ours", n_segments, bptt_depth=2, task=task) for task in TASKS]
        cases.append(Case("rmt", n_segments, bptt_depth=2))
        if n_segments <= 32:
            cases += [Case(model, n_segments) for model in ("bart", "led", "longt5")]
            cases.append(Case("led", n_segments, checkpointing="layer"))
    return cases


def memory(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Build every training setting of our model that changes the memory of its passes."""
    groups = []
    for batch_size, task, bptt_depth in itertools.product(batch_sizes, TASKS, (0, 2, -1)):
        cases = [
            Case("ours", n_segments, "passes", batch_size, task, bptt_depth, grain, schedule)
            for schedule, grain, n_segments in itertools.product(schedules, CHECKPOINTING_GRAINS, numbers)
        ]
        groups.append(Group(f"{task}-{bptt_depth}-{batch_size}", tuple(cases)))
    return groups
