"""Report of runs: one self-contained HTML page, and its charts as PNG files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recurrent_bart.files import atomic_write
from recurrent_bart.report.charts import CHARTS
from recurrent_bart.report.drawing import COLORS, SERIES, to_svg, write_png
from recurrent_bart.report.run_record import Run, different_validation, differing_flags, facts, key_metrics, slowest

TEMPLATE = "report.html.jinja"
# Colours of the dark page: the same hues, lighter.
DARK = {"ink": "#e6e9ef", "muted": "#a3acba", "grid": "#333a46", "paper": "#14171c"}
DARK_SERIES = ("#6fb4f0", "#ff9f66", "#56cdb9", "#ef8fcb", "#d6c24f", "#b6a5ff")


def write_report(runs: Sequence[Run], page: Path) -> list[Path]:
    """Write the report as an HTML page. Write its charts as PNG files into a folder with the page's name.

    Returns:
        Paths of all written files, the page first.
    """
    runs = with_unique_names(runs)
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures, sections = [], []
    for heading, charts in CHARTS.items():
        shown = []
        for chart in charts:
            figure = chart.draw(runs)
            if figure is not None:
                pictures.append(folder / f"{chart.name}.png")
                write_png(figure, pictures[-1])
                shown.append({"chart": chart, "svg": to_svg(figure, chart.name)})
        if shown:
            sections.append({"heading": heading, "charts": shown})
    atomic_write(page, render(runs, sections))
    return [page, *pictures]


def render(runs: Sequence[Run], sections: Sequence[dict[str, Any]]) -> str:
    """Return the report's page as HTML."""
    return render_template(
        TEMPLATE,
        runs=runs,
        sections=sections,
        metrics=_rows([key_metrics(run) for run in runs]),
        facts=_rows([facts(run) for run in runs]),
        flags=differing_flags(runs),
        different=different_validation(runs),
        samples=samples_together(runs),
        skips=[(run, record) for run in runs for record in run.records if record.get("skipped")],
        slowest=[(run, slowest(run)) for run in runs if slowest(run)],
    )


def render_template(template: str, **values: Any) -> str:
    """Return a self-contained page as HTML. The template includes `head.html.jinja`, which has the colours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colors = {"light": _variables(COLORS, SERIES), "dark": _variables(DARK, DARK_SERIES)}
    return environment.get_template(template).render(**values, **colors)


def with_unique_names(runs: Sequence[Run]) -> list[Run]:
    """Add a number to the names of runs whose folders have the same name."""
    names = [run.name for run in runs]
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [
        replace(run, name=f"{run.name} ({number})" if names.count(run.name) > 1 else run.name)
        for run, number in zip(runs, numbers, strict=True)
    ]


def samples_together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one entry per sample id and target: the texts of all runs, and the source from the first run with both.

    Documents of different data sets may have the same id.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for name, sample in run.samples.items():
            both = _source_and_target(sample)
            entry = found.setdefault((name, both["target"]), {"id": name, "generated": [], **both})
            entry["generated"].append((number, run.name, sample["step"], sample.get("generated", "")))
    return list(found.values())


def _source_and_target(sample: dict[str, Any]) -> dict[str, str]:
    return {name: sample.get(name, "") for name in ("source", "target")}


def _rows(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, cells) for name, cells in rows if any(cells)]


def _variables(colors: dict[str, str], series: Sequence[str]) -> dict[str, str]:
    return colors | {f"series-{number}": color for number, color in enumerate(series)}
