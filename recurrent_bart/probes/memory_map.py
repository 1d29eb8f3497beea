"""Map of how much the tokens of one document attend to the state, by layer and segment."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from recurrent_bart.model.modeling_recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.probes.memory_reads import plain_execution, read_context, read_segment
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import segment_documents
from recurrent_bart.report.drawing import (
    COLORS,
    SERIES,
    WIDTH,
    Table,
    dress,
    heat_map,
    limits_of,
    number_form,
    thinned,
    title,
    write_png,
)

# most columns of a table on a terminal; neighboring segments are averaged
MOST_COLUMNS = 10
# most segment borders to draw
MOST_BORDERS = 64


@dataclass(frozen=True)
class MemoryMap:
    """Measurements of attention to the state, by encoder tokens and by the decoder.

    Attributes:
        size: By layer and segment, norm of attention output over the state divided by the norm over tokens.
        mass: By layer and segment, share of the attention weights on the state.
        along: `size` of each token in order, mean over layers.
        segment_ends: Number of tokens read after each segment.
        gate: Mean absolute opening of the gate on the state by layer, 0 to 1; empty without a gate.
        decoder: `size` by decoder layer; empty if the decoder attends to no state.
    """

    size: Table
    mass: Table
    along: list[float]
    segment_ends: list[int]
    gate: list[float]
    decoder: list[float]


@torch.no_grad()
def map_memory(
    model: RecurrentBartForConditionalGeneration, ids: Tensor, attention_mask: Tensor | None = None, **generation: Any
) -> tuple[MemoryMap, Tensor]:
    """Encode and summarize a document; return the memory map and the summary's ids.

    `ids` are the document's n tokens, `(1, n)`, or its segments, `(1, N, L)`, with their padding mask. Raise ValueError
    if the model has no recurrence. `generation` holds arguments of `generate`.
    """
    recurrence = model.model.encoder.recurrence
    if recurrence is None:
        raise ValueError("pre_seq_len=0: the model has no state to read")
    segments, masks = segment_documents(model.config, False, ids, attention_mask, None)
    state: Any = RecurrentState.unread(model.config, 1, ids.device)
    reads = []
    with plain_execution(model.config):
        for ids_11L, mask_11L in zip(segments.split(1, dim=1), masks.split(1, dim=1), strict=True):
            output, read = read_segment(model, ids_11L, mask_11L, state)
            state = output.state
            reads.append(read)
        text = model.generate(encoder_outputs=output, **generation)
        context_reads = read_context(model, output, text)
    gate = getattr(recurrence, "prefix_gate", None)
    found = MemoryMap(
        size=torch.stack([read.size.mean(dim=1) for read in reads], dim=1).tolist(),
        mass=torch.stack([read.mass for read in reads], dim=1).tolist(),
        along=torch.cat([read.size.mean(dim=0) for read in reads]).tolist(),
        segment_ends=torch.tensor([read.size.shape[1] for read in reads]).cumsum(0).tolist(),
        gate=[] if gate is None else gate.float().tanh().abs().mean(dim=1).tolist(),
        decoder=[] if context_reads is None else context_reads.size.mean(dim=1).tolist(),
    )
    return found, text[0]


def as_text(found: MemoryMap) -> str:
    """Return the map as tables for a terminal."""
    parts = [
        "size of the read from the state over size of the read from tokens, by layer and segment",
        *_lines(found.size),
        "share of attention on the state, by layer and segment",
        *_lines(found.mass),
    ]
    for name, row in (
        ("opening of the gate on the state, by layer", found.gate),
        ("the decoder's read from the state over its read from tokens, by layer", found.decoder),
    ):
        if row:
            parts += [name, *_columns([row], [str(number + 1) for number in range(len(row))], [""])]
    return "\n".join(parts)


def _lines(table: Table) -> Iterator[str]:
    n_segments = len(table[0])
    size = -(-n_segments // MOST_COLUMNS)
    spans = [(start, min(start + size, n_segments)) for start in range(0, n_segments, size)]
    names = [str(stop) if stop - start == 1 else f"{start + 1}-{stop}" for start, stop in spans]
    rows = [[fmean(row[start:stop]) for start, stop in spans] for row in table]
    return _columns(rows, names, [str(number + 1) for number in range(len(rows))])


def _columns(rows: Table, names: Sequence[str], labels: Sequence[str]) -> Iterator[str]:
    form = number_form(max(value for row in rows for value in row))
    yield " " * 6 + "".join(f"{name:>9}" for name in names)
    for label, row in zip(labels, rows, strict=True):
        yield f"{label:>6}" + "".join(f"{value:>9{form}}" for value in row)


def draw_memory_map(found: MemoryMap, path: Path) -> None:
    """Draw the map as a PNG."""
    last: list[str] = [name for name, row in (("gate", found.gate), ("decoder", found.decoder)) if row]
    names = ["size", "mass", "along", *last]
    tall = 0.9 + 0.26 * len(found.size)
    heights = [tall, tall, 1.9, *([1.1] * len(last))]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = dict(zip(names, figure.subplots(len(names), height_ratios=heights), strict=True))
    for axes in panels.values():
        dress(axes)
    text = "size of the read from the state over size of the read from tokens"
    heat_map(panels["size"], found.size, text, "segment", "layer", limits_of([found.size]))
    text = "share of attention on the state"
    heat_map(panels["mass"], found.mass, text, "segment", "layer", limits_of([found.mass]))
    _draw_along(panels["along"], found)
    titles = {
        "gate": "opening of the gate on the state",
        "decoder": "decoder: read from the state over read from tokens",
    }
    for name in last:
        row = getattr(found, name)
        heat_map(panels[name], [row], titles[name], "layer", "", limits_of([[row]]))
        panels[name].set_yticks([])
    write_png(figure, path)


def _draw_along(axes: Any, found: MemoryMap) -> None:
    points = [(float(position), value) for position, value in enumerate(found.along, start=1)]
    axes.plot(*zip(*thinned(points), strict=True), color=SERIES[0], linewidth=1.0)
    for end in found.segment_ends[:-1] if len(found.segment_ends) <= MOST_BORDERS else ():
        axes.axvline(end + 0.5, color=COLORS["muted"], linewidth=0.6, linestyle=":")
    title(axes, "read from the state over read from tokens, along the text, mean over layers; dotted: segment ends")
    axes.set_xlabel("tokens read", fontsize=8)
    axes.set_xlim(0, len(points) + 1)
    axes.set_ylim(bottom=0)
