"""What is measured beside what."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recurrent_bart.data.rows import TASKS
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS

MODELS = {"ours": "ours", "rmt": "RMT on BART", "bart": "BART, full attention", "led": "LED", "longt5": "LongT5"}
# a training step with its optimizer; forward and backward passes alone, as of one micro-batch of several; the encoder;
# the decoder's texts
WORKS = ("training", "passes", "inference", "generation")
SUITES = ("quick", "grid", "headline", "memory")
SCHEDULES = ("sequential", "wavefront", "auto")


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        model: One of `MODELS`.
        n_segments: Length of each document, in segments.
        work: One of `WORKS`.
        batch_size: Documents.
        task: One target per document, or one per segment, which our model alone has.
        bptt_depth: Segment boundaries that gradient crosses, in the models that have some; -1: all.
        checkpointing: What is recomputed, one of `CHECKPOINTING_GRAINS`; others than our model have layers alone.
        schedule: Of our model.
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
        """Its model and how that is run, whatever the documents."""
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
    """Cases that are compared, and therefore measured in turns.

    Attributes:
        name: To choose it by.
        cases: In the order of the table.
    """

    name: str
    cases: tuple[Case, ...]


def build_suite(
    name: str, batch_sizes: Sequence[int], numbers: Sequence[int], schedules: Sequence[str] = SCHEDULES
) -> list[Group]:
    """Groups of a suite.

    Args:
        name: One of `SUITES`. `"quick"`: every model and every kind of work, on short documents. `"headline"`: the
            figures that the project is judged by. `"grid"`: every model by documents and segments. `"memory"`: what
            the passes of our model take, by target, horizon of gradient and recomputation.
        batch_sizes: Documents at once, of a grid and of memory.
        numbers: Likewise segments.
        schedules: Of our model, likewise.
    """
    if name == "quick":
        return quick()
    if name == "headline":
        return headline()
    return (grid if name == "grid" else memory)(batch_sizes, numbers, schedules)


def grid(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Every model, each with every checkpointing that it has, in training and in inference."""
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
    """Every model at two lengths, and each as a reader."""
    cases = []
    for n_segments in (1, 4):
        cases += [Case("ours", n_segments, schedule=schedule) for schedule in SCHEDULES]
        cases.append(Case("ours", n_segments, checkpointing="segment"))
        cases += [Case(model, n_segments) for model in list(MODELS)[1:]]
        cases.append(Case("led", n_segments, checkpointing="layer"))
    return [Group("length", tuple(cases)), Group("inference", tuple(readers(4, SCHEDULES))), generation()]


def generation() -> Group:
    """Our decoder and BART's, of as many positions, for one document and for many."""
    return Group(
        "generation",
        tuple(Case(model, 1, "generation", size) for size, model in itertools.product((1, 16), ("ours", "bart"))),
    )


def readers(n_segments: int, schedules: Sequence[str], batch_size: int = 1) -> list[Case]:
    """Encoders of all models."""
    ours = [Case("ours", n_segments, "inference", batch_size, schedule=schedule) for schedule in schedules]
    return ours + [Case(model, n_segments, "inference", batch_size) for model in list(MODELS)[1:]]


def headline() -> list[Group]:
    """One long document, full batches with and without checkpointing, reading, cost against length, generation."""
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
    """Models that carry a state with a horizon of gradient; the others up to where LED's position table ends."""
    cases = []
    for n_segments in numbers:
        cases += [Case("ours", n_segments, bptt_depth=2, task=task) for task in TASKS]
        cases.append(Case("rmt", n_segments, bptt_depth=2))
        if n_segments <= 32:
            cases += [Case(model, n_segments) for model in ("bart", "led", "longt5")]
            cases.append(Case("led", n_segments, checkpointing="layer"))
    return cases


def memory(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Every way to train our model that changes what its passes take."""
    groups = []
    for batch_size, task, bptt_depth in itertools.product(batch_sizes, TASKS, (0, 2, -1)):
        cases = [
            Case("ours", n_segments, "passes", batch_size, task, bptt_depth, grain, schedule)
            for schedule, grain, n_segments in itertools.product(schedules, CHECKPOINTING_GRAINS, numbers)
        ]
        groups.append(Group(f"{task}-{bptt_depth}-{batch_size}", tuple(cases)))
    return groups
