"""Tables and plots of the model benchmark."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullFormatter, StrMethodFormatter
from rich.table import Table

from recurrent_bart.benchmarks.models.cases import MODELS, Case
from recurrent_bart.benchmarks.models.measure import Measurement
from recurrent_bart.benchmarks.models.session import Results

MIB, GIB = 2**20, 2**30
STYLES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)))
# (model, label) -> value by document length
Lines = dict[tuple[str, str], dict[int, float]]
COLUMNS = ("documents", "segments", "ms", "tokens/s", "spread", "speed-up", "peak MiB", "step MiB", "TFLOP", "of peak")
LEGEND = (
    "ms: median time of a step; tokens/s: document tokens per second, or generated tokens per second for generation; "
    "spread: slowest step over fastest step; speed-up: speed of our fastest case over the speed of this case, with "
    "equal documents, a state and, if the group has it, decoder_context all; peak MiB: peak memory, weights and "
    "optimizer included; step MiB: peak memory without weights, optimizer and memory of CUDA graphs; TFLOP: useful "
    "operations of a step; of peak: operations per second over the rate of a large matrix product on this device. "
    "CUDA graph: one graph holds "
    "the forward and backward pass of a step, or the encoder. Attention is sdpa in ours, RMT, SegEnc and BART, and "
    "eager in LED and LongT5, for which transformers has nothing faster."
)


def group_table(name: str, group: dict[Case, Measurement]) -> Table:
    """Return the table of one group, one row per case."""
    peak = max(measured.matrix_peak for measured in group.values())
    work = next(iter(group)).work
    table = Table(title=f"{name}: {work}, matrix peak {peak / 1e12:.3g} TFLOP/s", title_justify="left")
    table.add_column("model", min_width=24)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for case, measured in group.items():
        table.add_row(case.label(), str(case.batch_size), str(case.n_segments), *_figures(group, case, measured))
    return table


def _figures(group: dict[Case, Measurement], case: Case, measured: Measurement) -> list[str]:
    if measured.outcome != "measured":
        return [measured.outcome]
    memory = [f"{measured.peak_bytes() / MIB:,.0f}", f"{measured.step_bytes / MIB:,.0f}"]
    operations = f"{measured.flops / 1e12:.3g}"
    if not measured.step_seconds:
        return ["", "", "", "", *memory, operations, ""]
    return [
        f"{1000 * measured.seconds():,.1f}",
        f"{measured.tokens_per_second():,.0f}",
        f"{measured.spread():.2f}",
        _advantage(group, case, measured),
        *memory,
        operations,
        f"{100 * measured.share_of_peak():.1f} %",
    ]


def _advantage(group: dict[Case, Measurement], case: Case, measured: Measurement) -> str:
    """Return the speed of the fastest case of "ours", divided by the speed of `case`, for documents of equal size.

    Only cases of "ours" with a state count; if the group has cases with `decoder_context="all"`, only these cases.
    """
    size = case.batch_size, case.n_segments
    ours = [
        there
        for there in group
        if there.model == "ours" and there.has_state and (there.batch_size, there.n_segments) == size
    ]
    # cases, measured or not: without a measurement of these, a cheaper context would be compared
    fused = [there for there in ours if there.decoder_context == "all"] or ours
    speeds = [group[there].tokens_per_second() for there in fused if group[there].step_seconds]
    if not speeds or case.model == "ours":
        return ""
    return f"{max(speeds) / measured.tokens_per_second():.2f} x"


def draw(results: Results, segment_size: int, folder: Path) -> list[Path]:
    """Plot training speed and memory against document length, for models with several lengths. Return the files."""
    timed = _lines(results, segment_size, lambda it: it.tokens_per_second() if it.step_seconds else None)
    taken = _lines(results, segment_size, lambda it: it.peak_bytes() / GIB)
    drawings = {
        folder / "throughput.png": (timed, "document tokens per second, training", EngFormatter(sep=" ")),
        folder / "memory.png": (taken, "peak memory, GiB, training", StrMethodFormatter("{x:g}")),
    }
    for path, (lines, title, numbers) in drawings.items():
        # delete the plot of an earlier benchmark
        path.unlink(missing_ok=True)
        if lines:
            _draw(lines, title, numbers, path)
    return [path for path, (lines, *_) in drawings.items() if lines]


def _lines(results: Results, segment_size: int, value: Callable[[Measurement], float | None]) -> Lines:
    """Return values by document length for each model and setting with several lengths, at the smallest batch size."""
    measured = [
        (case, value(it))
        for group in results.values()
        for case, it in group.items()
        if case.work in ("training", "passes") and it.outcome == "measured"
    ]
    smallest = min((case.batch_size for case, _ in measured), default=1)
    lines: Lines = {}
    for case, found in measured:
        if case.batch_size == smallest and found is not None:
            lines.setdefault((case.model, case.label()), {})[case.n_segments * segment_size] = found
    in_order = sorted(lines, key=lambda key: list(MODELS).index(key[0]))
    return {key: dict(sorted(lines[key].items())) for key in in_order if len(lines[key]) > 1}


def _draw(lines: Lines, title: str, numbers: Formatter, path: Path) -> None:
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    drawn: Counter[str] = Counter()
    for (model, label), line in lines.items():
        # color by model, line style by setting
        color, style = f"C{list(MODELS).index(model)}", STYLES[drawn[model] % len(STYLES)]
        axes.plot(list(line), list(line.values()), color=color, linestyle=style, label=label, marker="o", markersize=4)
        drawn[model] += 1
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("tokens of the document", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, format="png")
