"""Benchmark cases (one model, one kind of work, one document size) and suites of cases."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from recurrent_bart.data.rows import SUMMARY_TASKS
from recurrent_bart.model.modeling_pretrained import CHECKPOINTING_GRAINS

MODELS = {
    "ours": "ours",
    "rmt": "RMT on BART",
    "segenc": "SegEnc on BART",
    "bart": "BART, full attention",
    "led": "LED",
    "longt5": "LongT5",
}
# models whose steps can be captured as one CUDA graph
GRAPHED_MODELS = ("rmt", "segenc", "bart")
# "training": forward and backward pass, and optimizer step. "passes": forward and backward pass alone. "inference": the
# encoder alone. "generation": the decoder alone.
WORKS = ("training", "passes", "inference", "generation")
SUITES = ("quick", "grid", "headline", "memory")
SCHEDULES = ("sequential", "wavefront", "auto")


@dataclass(frozen=True)
class Case:
    """Settings of one measurement, which is one row of a table.

    Attributes:
        model: One of `MODELS`.
        n_segments: Segments in each document.
        work: One of `WORKS`.
        batch_size: Number of documents.
        task: `"document"`, or `"sections"` (one target per segment) for the model "ours".
        bptt_depth: Number of segment boundaries that the gradient crosses in recurrent models. -1: all.
        checkpointing: One of `CHECKPOINTING_GRAINS`. Models other than "ours" support only `"none"` and `"layer"`.
        schedule: Order in which the model "ours" computes the grid of layers and segments.
        decoder_context: Positions that the decoder of "ours" attends to; see `RecurrentBartConfig`.
        has_state: False: the model "ours" carries no state (`pre_seq_len=0`).
        graphed: True: forward and backward pass are one CUDA graph. For models in `GRAPHED_MODELS`, on a GPU, without
            checkpointing. The model "ours" captures its graphs itself.
    """

    model: str
    n_segments: int
    work: str = "training"
    batch_size: int = 1
    task: str = "document"
    bptt_depth: int = -1
    checkpointing: str = "none"
    schedule: str = "auto"
    decoder_context: str = "last"
    has_state: bool = True
    graphed: bool = False

    def label(self) -> str:
        """Return the name and the settings of the model, without number and size of documents."""
        parts = [MODELS[self.model]]
        if self.model == "ours" and self.work != "generation":
            parts.append(self.schedule)
            parts += [f"decoder_context {self.decoder_context}"] * (self.decoder_context != "last")
            parts += ["no state"] * (not self.has_state)
        if self.work in ("training", "passes"):
            if self.task != "document":
                parts.append("target per segment")
            if self.model in ("ours", "rmt") and self.bptt_depth != -1:
                parts.append(f"bptt_depth {self.bptt_depth}")
            if self.checkpointing != "none":
                parts.append(f"{self.checkpointing} checkpointing")
        if self.graphed:
            parts.append("CUDA graph")
        return ", ".join(parts)


@dataclass(frozen=True)
class Group:
    """Named cases that one table compares. Cases are measured alternately, so that clock drift affects all cases."""

    name: str
    cases: tuple[Case, ...]


def build_suite(
    name: str, batch_sizes: Sequence[int], numbers: Sequence[int], schedules: Sequence[str] = SCHEDULES
) -> list[Group]:
    """Build the case groups of the suite `name`, which is one of `SUITES`.

    `"quick"` runs every model and every kind of work on short documents. `"headline"` measures the project's goals.
    `"grid"` runs every model for every number of documents in `batch_sizes` and of segments in `numbers`. `"memory"`
    measures the memory of "ours" by target, `bptt_depth` and checkpointing. `schedules` applies to `"grid"` and
    `"memory"`.
    """
    if name == "quick":
        return quick()
    if name == "headline":
        return headline()
    return (grid if name == "grid" else memory)(batch_sizes, numbers, schedules)


def grid(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Build groups of training cases (every model, every checkpointing) and of inference cases (every model)."""
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
    """Build groups of short cases: training with two document lengths, inference, and generation."""
    cases = []
    for n_segments in (1, 4):
        cases += [Case("ours", n_segments, schedule=schedule) for schedule in SCHEDULES]
        cases.append(Case("ours", n_segments, checkpointing="segment"))
        cases += [Case(model, n_segments) for model in list(MODELS)[1:]]
        cases.append(Case("led", n_segments, checkpointing="layer"))
    return [Group("length", tuple(cases)), Group("inference", tuple(readers(4, SCHEDULES))), generation()]


def generation() -> Group:
    """Build the generation cases: "ours" and BART, with equal context lengths, for 1 and 16 documents."""
    return Group(
        "generation",
        tuple(Case(model, 1, "generation", size) for size, model in itertools.product((1, 16), ("ours", "bart"))),
    )


def readers(n_segments: int, schedules: Sequence[str], batch_size: int = 1) -> list[Case]:
    """Build the inference cases, which run the encoder of every model."""
    ours = [Case("ours", n_segments, "inference", batch_size, schedule=schedule) for schedule in schedules]
    return ours + [Case(model, n_segments, "inference", batch_size) for model in list(MODELS)[1:]]


def headline() -> list[Group]:
    """Build groups for the project's goals: one document, batches, inference, length, generation, peers."""
    one = [
        Case("ours", 32, schedule="sequential"),
        *(Case("ours", 32, checkpointing=grain) for grain in CHECKPOINTING_GRAINS),
        Case("rmt", 32),
        Case("rmt", 32, checkpointing="layer"),
        Case("segenc", 32),
        Case("segenc", 32, checkpointing="layer"),
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
        *peers(),
    ]


def peers() -> list[Group]:
    """Build groups that compare "ours" with the strongest form of each model: as `launch/train.py` trains, and graphed.

    `launch/train.py` trains with `decoder_context="all"` and `bptt_depth=-1` by default, for one target per document.
    """
    one = [
        *(fusion(32, checkpointing=grain) for grain in CHECKPOINTING_GRAINS),
        fusion(32, has_state=False),
        Case("ours", 32),
        *strongest("segenc", 32),
        Case("segenc", 32, checkpointing="layer"),
        Case("rmt", 32, graphed=True),
        *strongest("bart", 32),
        Case("bart", 32, checkpointing="layer"),
        Case("led", 32),
        Case("led", 32, checkpointing="layer"),
    ]
    batches = [fusion(8, batch_size=16), fusion(8, batch_size=16, has_state=False)]
    reading = [fusion(128, work="inference"), fusion(128, work="inference", has_state=False)]
    reading += [Case("ours", 128, "inference"), Case("rmt", 128, "inference", graphed=True)]
    return [
        Group("peers", tuple(one)),
        Group("peers-batch", (*batches, *strongest("segenc", 8, batch_size=16))),
        Group("peers-reading", (*reading, *strongest("segenc", 128, work="inference"))),
    ]


def fusion(n_segments: int, **fields: Any) -> Case:
    """Build a case of "ours" whose decoder attends to all segments."""
    return Case("ours", n_segments, decoder_context="all", **fields)


def strongest(model: str, n_segments: int, **fields: Any) -> list[Case]:
    """Build a model's case without and with a CUDA graph."""
    return [Case(model, n_segments, graphed=graphed, **fields) for graphed in (False, True)]


def lengths(numbers: Iterable[int]) -> list[Case]:
    """Build training cases by document length. Models that are not recurrent stop at LED's last position."""
    cases = []
    for n_segments in numbers:
        cases += [Case("ours", n_segments, bptt_depth=2, task=task) for task in SUMMARY_TASKS]
        cases.append(Case("rmt", n_segments, bptt_depth=2))
        if n_segments <= 32:
            cases += [Case(model, n_segments) for model in ("bart", "led", "longt5")]
            cases.append(Case("led", n_segments, checkpointing="layer"))
    return cases


def memory(batch_sizes: Iterable[int], numbers: Iterable[int], schedules: Sequence[str]) -> list[Group]:
    """Build a case for every training setting that changes the memory of the model "ours"."""
    groups = []
    for batch_size, task, bptt_depth in itertools.product(batch_sizes, SUMMARY_TASKS, (0, 2, -1)):
        cases = [
            Case("ours", n_segments, "passes", batch_size, task, bptt_depth, grain, schedule)
            for schedule, grain, n_segments in itertools.product(schedules, CHECKPOINTING_GRAINS, numbers)
        ]
        groups.append(Group(f"{task}-{bptt_depth}-{batch_size}", tuple(cases)))
    return groups
