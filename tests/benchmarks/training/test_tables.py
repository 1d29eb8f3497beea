"""Tables compare each run with one process and with the first sharding; failures state the reason."""

import io
from pathlib import Path

from rich.console import Console

from recurrent_bart.benchmarks.training.results import MEASURED, Launch, LoopCost, Speed, empty_results, plan
from recurrent_bart.benchmarks.training.tables import summary, training_tables

ZERO2, ZERO3 = Path("zero2.json"), Path("zero3.json")


def speed(tokens_per_second):
    return Speed(MEASURED, [tokens_per_second] * 3, [0.1, 0.2, 0.3], [0.0, 0.0, 0.15], 2**30)


def rows_of(results):
    """Return the cells of each row by (processes, sharding, number of cells)."""
    console = Console(file=io.StringIO(), width=200)
    for table in training_tables(results):
        console.print(table)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    return {(row[0], row[1], len(row)): row[2:] for row in cells if row and row[0]}


def test_a_run_stands_beside_one_process_and_beside_the_first_sharding():
    results = empty_results(plan(["runs"], [1, 2], [ZERO2, ZERO3]))
    for n_processes, file, tokens in ((1, ZERO2, 1000), (1, ZERO3, 500), (2, ZERO2, 1600), (2, ZERO3, 800)):
        results[Launch("runs", n_processes, file)] = speed(tokens)
    rows = rows_of(results)
    assert next(iter(rows))[:2] == ("1", "zero2")
    assert rows["1", "zero2", 11][:4] == ["1,000", "1,000", "100.0 %", ""]
    assert rows["2", "zero2", 11] == ["1,600", "800", "80.0 %", "", "200.0", "3.00", "25.0 %", "1,024", ""]
    assert rows["2", "zero3", 11][:4] == ["800", "400", "80.0 %", "50.0 %"]


def test_what_there_is_nothing_to_compare_with_for_stays_empty():
    results = empty_results(plan(["runs"], [1, 2], [ZERO2, ZERO3]))
    results[Launch("runs", 2, ZERO3)] = speed(800)
    results[Launch("runs", 1, ZERO3)].outcome = "failed, exit code 1: [/red] out of memory"
    rows = rows_of(results)
    assert rows["2", "zero3", 11][:4] == ["800", "400", "", ""]
    assert rows["1", "zero3", 11][-1] == "failed, exit code 1: [/red] out of memory"
    assert rows["2", "zero2", 11][-1] == "not measured: the time limit is reached"


def test_the_loop_has_a_table_of_its_own():
    results = empty_results(plan(["runs", "loop"], [1], [ZERO2]))
    results[Launch("loop", 1, ZERO2)] = found = LoopCost(MEASURED, [0.101, 0.103, 0.1], [0.1, 0.1, 0.1])
    rows = rows_of(results)
    assert rows["1", "zero2", 8] == ["101.00", "100.00", "+1.00 %", "+0.00 %", "+3.00 %", ""]
    assert len(rows) == 2
    assert summary(Launch("loop", 1, ZERO2), found) == "loop-1-zero2: the loop costs 1.00 %"
