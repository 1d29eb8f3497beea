"""Write one HTML page that reports on runs: `python launch/report.py RUN [RUN ...]`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from recurrent_bart.commands.exit_codes import print_mistake
from recurrent_bart.report.page import write_report
from recurrent_bart.report.run_record import read_run
from recurrent_bart.run_folder import RunFolder
from recurrent_bart.training.data_arguments import DataArguments
from recurrent_bart.training.flags import FlagParser
from recurrent_bart.training.lifecycle.spikes import SpikeWatch
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.tracking_arguments import TrackingArguments

KINDS = (ModelArguments, DataArguments, RunArguments, TrackingArguments)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of this script."""
    parser = FlagParser(description="Write a report on one or more runs as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several runs are compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="HTML file of the report; default: report.html in the first RUN"
    )
    return parser.parse_flags(argv)


def default_flags() -> dict[str, Any]:
    """Return the default values of the flags of launch/train.py."""
    return {item.name: item.default for kind in KINDS for item in fields(kind)}


def spikes(folder: Path) -> list[str]:
    """Return the warnings about loss spikes in a run's log."""
    watch = SpikeWatch()
    logged = [record for record in RunFolder(folder).read_metrics() if record.get("loss") is not None]
    return [warning for record in logged if (warning := watch.warning(record))]


def main(argv: list[str]) -> int:
    """Write the report. Return the exit code."""
    arguments = parse_arguments(argv)
    page = arguments.output or arguments.runs[0] / "report.html"
    try:
        runs = [read_run(folder, default_flags(), spikes(folder)) for folder in arguments.runs]
        written = write_report(runs, page)
    except (ValueError, OSError) as error:
        return print_mistake(error)
    print(f"report in {written[0]}; {len(written) - 1} charts in {page.with_suffix('')}")
    return 0
