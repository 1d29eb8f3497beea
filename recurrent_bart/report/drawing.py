"""Functions that draw the report's lines, stacked bars and heat maps, and that convert figures to PNG and SVG."""

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator

# Colours of the light page. In SVG, each colour becomes a CSS variable with the name given here.
COLORS = {"ink": "#1b1f26", "muted": "#5a6270", "grid": "#dfe3e9", "paper": "#fefefe"}
SERIES = ("#0b61a4", "#b8460e", "#0c7265", "#97266d", "#6a5a00", "#5b43b5")
STYLES = ("-", "--", ":", "-.")
# This colour map is readable for colour-blind readers and in greyscale print.
# Fonts with Japanese and Chinese letters on Linux, macOS and Windows.
EAST_ASIAN_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "WenQuanYi Zen Hei"),
    *("Hiragino Sans", "Yu Gothic", "MS Gothic", "Arial Unicode MS"),
)
SHADES = matplotlib.colormaps["cividis"]
# Maximum number of points of a line. With more points, each drawn point is the mean of a group of points.
MOST_POINTS = 400
# A line with fewer points than this has a marker at each point.
FEW = 40
# A heat map with more columns than this has no numbers in its cells.
MOST_NUMBERED = 16
# Width of a figure, in inches.
WIDTH = 7.6
# Width of a legend entry without its text, and approximate width of a letter, both in points.
LABEL_POINTS, LETTER_POINTS = 38, 4.3
STEP = "optimizer step"

Points = list[tuple[float, float]]
Table = list[list[float]]


def new_figure(height: float, n_rows: int = 1, n_columns: int = 1, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    """Create a figure as wide as the page. Return the figure and its axes, row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=share_x)
    for axes in grid.flat:
        dress(axes)
    return figure, list(grid.flat)


def dress(axes: Axes) -> None:
    """Style the axes with few border lines and the page's colours."""
    axes.tick_params(which="both", labelsize=8, colors=COLORS["muted"], length=0)
    axes.xaxis.label.set_color(COLORS["muted"])
    axes.yaxis.label.set_color(COLORS["muted"])
    axes.title.set_color(COLORS["ink"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["muted"])
    axes.set_axisbelow(True)


def plain_label(name: str) -> str:
    """Return a name as a Matplotlib label. `$` would start a formula, and a leading `_` would hide the label."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def title(axes: Axes, text: str) -> None:
    """Set the title of the axes to `text`, which includes the unit."""
    axes.set_title(text, fontsize=9, loc="left", color=COLORS["ink"])


def lines(
    axes: Axes,
    series: Sequence[tuple[str, Points, int, int]],
    text: str,
    x_label: str = STEP,
    is_log: bool = False,
    starts_at_0: bool = True,
    numbers: Formatter | None = None,
) -> None:
    """Draw a line for each entry of `series`: label (empty: no label), points, colour index, line style index.

    `starts_at_0` applies to a linear y axis only. `numbers` formats the numbers of the y axis.
    """
    for label, points, color, style in series:
        thin = thinned(points)
        marker = "o" if len(thin) < FEW else ""
        axes.plot(
            *zip(*thin, strict=True),
            STYLES[style % len(STYLES)],
            color=SERIES[color % len(SERIES)],
            label=label or None,
            marker=marker,
            markersize=3,
            linewidth=1.6,
        )
    title(axes, text)
    axes.grid(axis="y", color=COLORS["grid"], linewidth=0.8)
    axes.set_xlabel(x_label, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlim(left=0 if x_label == STEP else None)
    if is_log:
        axes.set_yscale("log")
    elif starts_at_0:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    if numbers:
        axes.yaxis.set_major_formatter(numbers)


def legend(figure: Figure) -> None:
    """Draw one legend below all axes if there is more than one label."""
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
    if len(handles) > 1:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower left",
            ncols=max(1, int(72 * WIDTH / (LABEL_POINTS + LETTER_POINTS * max(map(len, handles))))),
            frameon=False,
            fontsize=8,
            labelcolor=COLORS["ink"],
        )


def thinned(points: Points) -> Points:
    """Average groups of points so that at most `MOST_POINTS` remain."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def stacked_bars(axes: Axes, rows: dict[str, dict[str, float]], text: str) -> None:
    """Draw one horizontal bar per row of `rows`. The parts of a row lie side by side in its bar."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    for number, name in enumerate(names):
        widths = [parts.get(name, 0.0) for parts in rows.values()]
        starts = [sum(parts.get(other, 0.0) for other in names[:number]) for parts in rows.values()]
        # An edge in the page's colour separates the parts without relying on colour.
        axes.barh(
            list(rows),
            widths,
            left=starts,
            height=0.6,
            label=name,
            color=SERIES[number % len(SERIES)],
            edgecolor=COLORS["paper"],
        )
    axes.invert_yaxis()
    title(axes, text)
    axes.grid(axis="x", color=COLORS["grid"], linewidth=0.8)
    if len(rows) == 1:
        axes.set_yticks([])


def heat_map(
    axes: Axes,
    table: Table,
    text: str,
    x_label: str,
    y_label: str,
    limits: tuple[float, float],
    columns: Sequence[object] = (),
) -> None:
    """Draw a table as a heat map with the first row at the top.

    `x_label` says what a column means, `y_label` what a row means. `limits` are the values of the darkest and lightest
    shade. Columns are numbered from 1 unless `columns` names them.
    """
    low, high = limits
    mesh = axes.pcolormesh(table, cmap=SHADES, vmin=low, vmax=high, edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    title(axes, text)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.spines["bottom"].set_visible(False)
    _name_cells(axes.set_xticks, list(columns) or range(1, len(table[0]) + 1))
    _name_cells(axes.set_yticks, range(1, len(table) + 1))
    if len(table[0]) <= MOST_NUMBERED:
        _write_numbers(axes, table, limits)
        return
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=COLORS["muted"], length=0)


def _name_cells(set_ticks: Callable[..., Any], names: Sequence[Any]) -> None:
    every = math.ceil(len(names) / 16)
    set_ticks([place + 0.5 for place in range(0, len(names), every)], names[::every])


def _write_numbers(axes: Axes, table: Table, limits: tuple[float, float]) -> None:
    low, high = limits
    form = number_form(high)
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            is_dark = (value - low) / ((high - low) or 1.0) < 0.5
            color = "#ffffff" if is_dark else "#000000"
            text = format(value, form) if value else "0"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=color)


def number_form(highest: float) -> str:
    """Return a format with two or three significant digits for numbers up to `highest`."""
    forms = ((10, ".1f"), (0.1, ".2f"), (0.01, ".3f"), (0.001, ".4f"))
    return next((form for least, form in forms if highest >= least), ".0e")


def limits_of(tables: Sequence[Table], from_0: bool = True) -> tuple[float, float]:
    """Return the limits of one colour scale for all tables: lowest number (0 if `from_0`) and highest number."""
    values = [value for table in tables for row in table for value in row]
    low = 0.0 if from_0 else min(values)
    return low, max([*values, low + 1e-9])


def thousands() -> Formatter:
    """Return a formatter that prints 17500 as "17.5 k"."""
    return EngFormatter(sep=" ")


@functools.cache
def font_families() -> tuple[str, ...]:
    """Return matplotlib's own font and an installed font with Japanese and Chinese letters, if there is one."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *[name for name in EAST_ASIAN_FONTS if name in installed][:1])


@contextlib.contextmanager
def fonts_of_every_script(figure: Figure) -> Iterator[None]:
    """Draw a figure's texts with `font_families`; a missing letter is a box without a warning for each letter."""
    for text in figure.findobj(Text):
        text.set_fontfamily(list(font_families()))
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": list(font_families())}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def write_png(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG file with white background."""
    with fonts_of_every_script(figure):
        figure.savefig(path, dpi=130, format="png", facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element with real text and with CSS variables as colours."""
    file = io.StringIO()
    with fonts_of_every_script(figure), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Remove the ids of SVG groups, because several drawings on one page would have equal ids.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    # The page's layout decides the width.
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    variables = {**{color: name for name, color in COLORS.items()}, **{c: f"series-{n}" for n, c in enumerate(SERIES)}}
    for color, variable in variables.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
