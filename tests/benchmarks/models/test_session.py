"""Cases take turns, and results are on disk after every turn."""

import io
import json

import matplotlib.image
import pytest
import torch
from rich.console import Console

from recurrent_bart.benchmarks.models import session, tables
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting
from recurrent_bart.benchmarks.models.cases import Case, Group
from recurrent_bart.benchmarks.models.measure import OUT_OF_MEMORY, Measurement
from recurrent_bart.benchmarks.models.session import Effort, run_groups, write_results
from recurrent_bart.benchmarks.models.tables import draw, group_table

SETTING = BenchmarkSetting("tiny", 16, torch.device("cpu"), torch.float32)
OURS, LED = Case("ours", 4), Case("led", 4)
GROUPS = [Group("one", (OURS, LED)), Group("two", (Case("bart", 2),))]


@pytest.fixture
def calls(monkeypatch):
    """Collect cases in the order of measurement; LED runs out of memory."""
    calls = []

    def measure(case, setting, measurement, n_warmup, n_passes):
        calls.append(case)
        measurement.outcome = OUT_OF_MEMORY if case == LED else "measured"
        measurement.step_seconds += [0.1] * n_passes

    monkeypatch.setattr(session, "measure", measure)
    monkeypatch.setattr(session, "matrix_peak", lambda device, dtype: 1e9)
    return calls


def test_cases_of_a_group_take_turns_and_one_without_room_is_not_tried_again(calls):
    kept = []
    results = run_groups(GROUPS, SETTING, Effort(2, 1, 3), lambda found: kept.append(len(found)))
    assert calls == [OURS, LED, OURS, *GROUPS[1].cases * 2]
    assert len(results["one"][OURS].step_seconds) == 6
    assert results["one"][LED].outcome == OUT_OF_MEMORY
    assert results["two"][GROUPS[1].cases[0]].matrix_peak == 1e9
    assert len(kept) == len(calls)


def test_when_the_time_is_over_the_rest_is_not_measured(calls, monkeypatch):
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    results = run_groups(GROUPS, SETTING, Effort(1, 1, 1, budget_seconds=5), lambda _: None)
    assert calls == [OURS]
    assert results["one"][LED].outcome == results["two"][GROUPS[1].cases[0]].outcome == "not measured"


def found(tokens_per_second, n_segments=4, gib=1):
    n_tokens = 16 * n_segments
    seconds = n_tokens / tokens_per_second
    return Measurement("measured", [seconds] * 3, n_tokens, 2e6 * seconds, 2**30 * gib, 2**30 * gib, 1e7)


def test_the_file_has_a_line_for_each_case(tmp_path):
    path = tmp_path / "results.json"
    results = {"one": {OURS: found(200), LED: Measurement(OUT_OF_MEMORY)}}
    write_results(path, results, {"device": "a device"})
    written = json.loads(path.read_text())
    ours, led = written["results"]
    assert written["device"] == "a device"
    assert (ours["group"], ours["model"], ours["n_segments"], ours["label"]) == ("one", "ours", 4, "ours, auto")
    assert ours["tokens_per_second"] == pytest.approx(200)
    assert ours["share_of_peak"] == pytest.approx(0.2)
    assert led["outcome"] == OUT_OF_MEMORY
    assert led["tokens_per_second"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def text_of(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_table_compares_with_our_fastest_of_the_same_documents():
    group = {
        OURS: found(200),
        Case("ours", 4, schedule="sequential"): found(150),
        Case("ours", 8): found(900, 8),
        Case("ours", 4, batch_size=16): found(900),
        Case("rmt", 4): found(50),
        LED: Measurement(OUT_OF_MEMORY),
        Case("bart", 4): Measurement(),
    }
    rows = [line for line in text_of(group_table("one", group)).splitlines() if "│" in line]
    lines = {row.split("│")[1].strip(): row for row in rows}
    assert "4.00 x" in lines["RMT on BART"]
    assert " x" not in lines["ours, auto"] + lines["ours, sequential"]
    assert "20.0 %" in lines["RMT on BART"]
    assert "2,048" in lines["RMT on BART"]
    assert OUT_OF_MEMORY in lines["LED"]
    assert "not measured" in lines["BART, full attention"]


def test_a_table_compares_with_our_default_of_training_if_the_group_has_it():
    group = {
        Case("ours", 4): found(400),
        Case("ours", 4, decoder_context="all"): found(200),
        Case("ours", 4, decoder_context="all", has_state=False): found(300),
        Case("segenc", 4): found(100),
    }
    (line,) = (line for line in text_of(group_table("one", group)).splitlines() if "SegEnc" in line)
    assert "2.00 x" in line


def test_a_table_compares_with_no_cheaper_context_if_our_default_was_not_measured():
    fused = Case("ours", 4, decoder_context="all")
    group = {Case("ours", 4): found(400), fused: Measurement(OUT_OF_MEMORY), Case("segenc", 4): found(100)}
    (line,) = (line for line in text_of(group_table("one", group)).splitlines() if "SegEnc" in line)
    assert " x" not in line


def test_lines_of_memory_alone_have_no_speed():
    measured = found(100)
    measured.step_seconds = []
    line = text_of(group_table("one", {OURS: measured}))
    assert "2,048" in line
    assert "nan" not in line


def test_two_pictures_are_drawn_with_a_line_for_each_model(tmp_path, monkeypatch):
    lines = []
    drawn = tables._draw
    monkeypatch.setattr(tables, "_draw", lambda of, *others: lines.append(of) or drawn(of, *others))
    results = {
        "length": {Case(model, n): found(100 * n, n, gib=n) for model in ("ours", "rmt") for n in (1, 4)},
        "other": {LED: found(5), Case("rmt", 8, batch_size=16): found(1), Case("ours", 8, "inference"): found(1)},
    }
    files = draw(results, 16, tmp_path)
    assert [file.name for file in files] == ["throughput.png", "memory.png"]
    assert lines[0] == {
        ("ours", "ours, auto"): {16: pytest.approx(100), 64: pytest.approx(400)},
        ("rmt", "RMT on BART"): {16: pytest.approx(100), 64: pytest.approx(400)},
    }
    assert lines[1]["rmt", "RMT on BART"] == {16: 2, 64: 8}
    for file in files:
        assert len({tuple(pixel) for row in matplotlib.image.imread(file)[::4, ::4] for pixel in row}) > 10


def test_of_one_length_there_is_no_picture_nor_that_of_an_earlier_run(tmp_path):
    (tmp_path / "throughput.png").touch()
    assert draw({"one": {OURS: found(5)}, "other": {LED: Measurement()}}, 16, tmp_path) == []
    assert not list(tmp_path.iterdir())
