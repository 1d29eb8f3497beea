"""Tables of the training benchmark."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from recurrent_bart.benchmarks.training.results import MEASURED, Launch, LoopCost, Results, Speed

MIB = 2**20
RUNS = ("tokens/s", "per process", "of 1 process", "of {first}", "step ms", "spread", "waiting", "peak MiB")
LOOP = ("trainer ms", "bare ms", "loop costs", "least", "most")
LEGEND = (
    "tokens/s: document tokens per second, median over the log lines after the warm-up; of 1 process: tokens/s of each "
    "process over tokens/s of a single process; spread: slowest log line over fastest log line; waiting: share of the "
    "time spent waiting for data; peak MiB: peak memory of the process with the most. trainer: step of the training "
    "loop, logging included; bare: forward pass, backward pass and optimizer update alone, with the same engine and "
    "batches; loop costs: time of a trainer step beyond a bare step, median over rounds; least and most: smallest and "
    "largest cost of a round."
)


def training_tables(results: Results) -> list[Table]:
    """Return one table per part of the benchmark. Each launch is one row. Rows are sorted by number of processes."""
    launches = sorted(results, key=lambda launch: launch.n_processes)
    runs = [launch for launch in launches if launch.part == "runs"]
    loops = [launch for launch in launches if launch.part == "loop"]
    tables = []
    if runs:
        columns = [column.format(first=first_sharding(results)) for column in RUNS]
        tables.append(_table("steps of launch/train.py", columns, runs, results))
    if loops:
        tables.append(_table("training loop compared with bare steps", LOOP, loops, results))
    return tables


def first_sharding(results: Results) -> str:
    """Return the name of the first DeepSpeed configuration, with which the tables compare the rest."""
    return next(iter(results)).sharding.stem


def _table(title: str, columns: Sequence[str], launches: Sequence[Launch], results: Results) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("processes", "sharding", *columns):
        table.add_column(column, justify="left" if column == "sharding" else "right")
    table.add_column("", overflow="fold")
    for launch in launches:
        found, row = results[launch], [str(launch.n_processes), launch.sharding.stem]
        if found.outcome == MEASURED:
            row += speed_cells(launch, results) if isinstance(found, Speed) else loop_cells(found)
        else:
            # the outcome may hold program output that looks like rich markup
            row += [*[""] * len(columns), escape(found.outcome)]
        table.add_row(*row)
    return table


def speed_cells(launch: Launch, results: Results) -> Iterator[str]:
    """Yield the table cells of a run. Two cells compare it with one process and with the first sharding."""
    found = results[launch]
    assert isinstance(found, Speed)
    metrics = found.metrics()
    speed = metrics["tokens_per_second"] / launch.n_processes
    yield f"{metrics['tokens_per_second']:,.0f}"
    yield f"{speed:,.0f}"
    alone = _speed(results, 1, launch.sharding.stem)
    yield f"{100 * speed / alone:.1f} %" if alone else ""
    first = first_sharding(results)
    other = _speed(results, launch.n_processes, first)
    yield f"{100 * speed / other:.1f} %" if other and first != launch.sharding.stem else ""
    yield f"{1000 * metrics['step_seconds']:,.1f}"
    yield f"{metrics['spread']:.2f}"
    yield f"{100 * metrics['waiting']:.1f} %"
    yield f"{found.peak_bytes / MIB:,.0f}"


def loop_cells(found: LoopCost) -> Iterator[str]:
    """Yield the table cells that compare the training loop with bare steps."""
    metrics = found.metrics()
    yield f"{1000 * metrics['trainer_step_seconds']:,.2f}"
    yield f"{1000 * metrics['bare_step_seconds']:,.2f}"
    for name in ("cost", "least_cost", "most_cost"):
        yield f"{100 * metrics[name]:+.2f} %"


def summary(launch: Launch, found: Speed | LoopCost) -> str:
    """Return the result of a launch in one line."""
    if found.outcome != MEASURED:
        return f"{launch.name()}: {found.outcome}"
    metrics = found.metrics()
    if isinstance(found, Speed):
        return f"{launch.name()}: {metrics['tokens_per_second']:,.0f} tokens/s"
    return f"{launch.name()}: the loop costs {100 * metrics['cost']:.2f} %"


def _speed(results: Results, n_processes: int, sharding: str) -> float | None:
    """Return the tokens per second of each process, or None if the launch was not measured."""
    for launch, found in results.items():
        is_it = (launch.part, launch.n_processes, launch.sharding.stem) == ("runs", n_processes, sharding)
        if is_it and isinstance(found, Speed) and found.outcome == MEASURED:
            return found.metrics()["tokens_per_second"] / n_processes
    return None
