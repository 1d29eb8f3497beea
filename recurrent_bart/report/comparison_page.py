"""Pages that show texts of several systems side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recurrent_bart.files import atomic_write
from recurrent_bart.report.drawing import legend, lines, new_figure, plain_label, to_svg
from recurrent_bart.report.page import render_template

TEMPLATE = "comparison.html.jinja"


@dataclass(frozen=True)
class Entry:
    """Texts of one target. Each text has the number and the name of its system, a note, and the text itself."""

    title: str
    texts: list[tuple[int, str, str, str]]
    targets: list[str]
    source: str | None = None
    query: str | None = None


def write_comparison_page(
    path: Path,
    names: Sequence[str],
    caption: str,
    entries: Sequence[Entry],
    table: Sequence[Sequence[str]] = (),
    descriptions: Mapping[str, str] | None = None,
    svg: str = "",
) -> None:
    """Write the page. The first row of `table` has the names of its columns."""
    page = render_template(
        TEMPLATE,
        names=names,
        caption=caption,
        entries=entries,
        table=table,
        descriptions=descriptions or {},
        svg=svg,
    )
    atomic_write(path, page)


def draw_differences(differences: Mapping[str, Sequence[float]], score: str, first: str) -> str:
    """Return an SVG with each system's differences to the first system, in ascending order."""
    figure, (axes,) = new_figure(height=2.4)
    series = []
    for number, (name, values) in enumerate(differences.items(), start=1):
        points = [(float(place), value) for place, value in enumerate(sorted(values), start=1)]
        if points:
            series.append((plain_label(name), points, number, 0))
    text = plain_label(f"{score}: difference to {first}")
    lines(axes, series, text, x_label="texts, in ascending order of the difference", starts_at_0=False)
    legend(figure)
    return to_svg(figure, "differences")
