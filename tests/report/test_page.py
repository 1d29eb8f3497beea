"""The page shows the data of run folders, is self-contained, and escapes all texts."""

import json
import re

import matplotlib.image
import pytest

from recurrent_bart.report.drawing import COLORS, SERIES
from recurrent_bart.report.page import DARK, DARK_SERIES, samples_together, write_report
from recurrent_bart.report.run_record import read_run
from reported_runs import DEFAULTS, Page, evaluation_record, sample, step_record, write_run

RECORDS = [
    evaluation_record(0, validation_loss=9.0),
    step_record(10),
    {"step": 15, "skipped": "gradient not finite on rank 1"},
    step_record(20),
    evaluation_record(20),
    {"step": 20, "checkpoint_seconds": 1.5},
]
SAMPLES = [sample("paper-1", "a long source", "a target", "a generated text")]
EVIL = "<script>alert('1')</script> & <img src=x onerror=alert(2)> {{ 1 + 1 }} $x$ ]]>"


def report(folders, file, **how):
    """Write a report on runs and return its page."""
    runs = [read_run(folder, DEFAULTS, **how) for folder in folders]
    return Page(write_report(runs, file)[0].read_text(encoding="utf-8"))


@pytest.fixture
def make_page(tmp_path):
    """Return a function that writes a report and returns its page."""
    return lambda *folders, **how: report(folders, tmp_path / "out" / "page.html", **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a finished run with its report."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", RECORDS, SAMPLES)
    (folder / "outcome.json").write_text(json.dumps({"code": 0, "reason": "", "step": 20}))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """Return the page of the report, `FOLDER/page.html`."""
    return report([folder], folder / "page.html")


def follows(page, name):
    """Return the text that follows `name` on the page."""
    return page.texts[page.texts.index(name) + 1]


@pytest.mark.slow
def test_key_metrics_equal_the_log(page):
    expected = {
        "best validation loss": "5.0000",
        "last training loss": "6.0000",
        "ROUGE-1": "31.25",
        "steps": "20 of 40",
        "tokens per second": "17,500",
        "share of peak": "37 %",
        "seconds per step": "2.50",
        "peak memory": "3.0 GiB",
        "skipped steps": "1",
        "state": "finished",
        "cut documents": "12",
        "processes": "2, on node-a, node-b",
        "evaluations": "2, median 4.0 s",
        "checkpoints": "1, median 1.5 s",
        "best evaluation": "after step 20",
        "command": "launch/train.py --segment_size 64 --dataset papers --max_steps 40 --learning_rate 0.5 "
        "--output_dir somewhere",
    }
    assert {name: follows(page, name) for name in expected} == expected
    assert "gradient not finite on rank 1" in page.text()
    assert "slowest most often: rank 1 on node-b, in 100 % of the log lines" in page.text()
    assert "python " in follows(page, "versions")


def test_numbers_of_heat_maps_are_text_elements(page):
    texts = page.texts
    for numbers in ("0.12 0.50 0.25 0.75", "0.11 0.23", "0.31 0.43", "5.10 6.30", "0.91 0.62", "0.80 1.20"):
        assert set(numbers.split()) <= set(texts), numbers


def test_all_charts_are_in_the_page_and_saved_as_files(page, folder):
    figures = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    pictures = {picture.stem: picture for picture in (folder / "page").glob("*.png")}
    assert pictures.keys() == {
        *("loss", "rouge", "speed", "seconds", "processes"),
        *("gates", "prefix_size", "prefix_mass", "state_norm", "state_change", "gradient"),
    }
    assert len(set(figures)) == len(figures) == len(pictures)
    for picture in pictures.values():
        height, width, _ = matplotlib.image.imread(picture).shape
        assert width > 900
        assert height > 100


def test_the_page_loads_no_other_file(page):
    assert not page.tags() & {"script", "img", "iframe", "object", "embed", "base"}
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, value)
            assert not name.startswith("on"), (tag, name)
            assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)", value or "")), (tag, value)


def test_all_references_of_charts_resolve(page):
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = {
        value[1:] for _, a in page.elements for name, value in a.items() if name.endswith("href") and value[0] == "#"
    }
    used |= {
        name for _, a in page.elements for value in a.values() for name in re.findall(r"url\(#([^)]*)\)", value or "")
    }
    assert used
    assert used <= set(names)


@pytest.mark.usefixtures("page")
def test_charts_have_colours_for_light_and_dark_mode(folder):
    html = (folder / "page.html").read_text()
    drawings = html[html.index("<svg") :]
    assert not [color for color in (*COLORS.values(), *SERIES) if color in drawings]
    assert "var(--ink)" in drawings
    assert "var(--series-0)" in drawings
    night = html[html.index("prefers-color-scheme: dark") :].split("}")[0]
    assert all(color in night for color in (*DARK.values(), *DARK_SERIES))
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+):", night))


def luminance(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colors", "series"), [(COLORS, SERIES), (DARK, DARK_SERIES)], ids=["day", "night"])
def test_texts_and_lines_have_enough_contrast(colors, series):
    assert contrast(colors["ink"], colors["paper"]) > 7
    assert all(contrast(color, colors["paper"]) > 4.5 for color in (colors["muted"], *series))


@pytest.mark.slow
def test_texts_of_users_are_escaped(tmp_path, make_page):
    records = [step_record(10, slowest_host=EVIL), evaluation_record(10), {"step": 12, "skipped": EVIL}]
    # A folder's name contains no slash.
    name = EVIL.replace("/", "|")
    folder = write_run(tmp_path / name, records, [sample(EVIL, EVIL, EVIL, EVIL)], dataset=EVIL)
    other = write_run(tmp_path / "_other", records)
    page = make_page(folder, other, warnings=[EVIL])
    assert not page.tags() & {"script", "img"}
    assert page.texts.count(EVIL) >= 5
    # The name is in the drawings too.
    assert sum(name in text for text in page.texts) > 10


@pytest.mark.slow
def test_runs_are_compared(tmp_path, make_page):
    one = write_run(tmp_path / "a" / "run", RECORDS, SAMPLES)
    two = write_run(
        tmp_path / "b" / "run",
        [step_record(10), evaluation_record(10, validation_loss=3.5)],
        [sample("paper-1", "a long source", "a target", "another text")],
        learning_rate=0.25,
        max_steps=10,
        output_dir="elsewhere",
    )
    page = make_page(one, two)
    at = page.texts.index
    assert page.texts[at("best validation loss") :][:3] == ["best validation loss", "5.0000", "3.5000"]
    assert page.texts[at("learning_rate") :][:3] == ["learning_rate", "0.5", "0.25"]
    assert page.texts[at("max_steps") :][:3] == ["max_steps", "40", "10"]
    assert "output_dir" not in page.texts
    assert "segment_size" not in page.texts
    assert {"run (1)", "run (2)", "run (2), after step 10"} <= set(page.texts)
    assert page.texts.count("a long source") == 1
    assert {"a generated text", "another text"} <= set(page.texts)


def test_texts_of_different_documents_with_the_same_id_are_apart(tmp_path):
    made = [("a.jsonl:1", "target one", "text one"), ("a.jsonl:1", "target two", "text two")]
    made.append(("a.jsonl:1", "target one", "text three"))
    runs = []
    for number, (name, target, text) in enumerate(made):
        folder = write_run(tmp_path / str(number), RECORDS, [sample(name, f"source {number}", target, text)])
        runs.append(read_run(folder, DEFAULTS))
    first, second = samples_together(runs)
    assert (first["source"], first["target"]) == ("source 0", "target one")
    assert [(number, text) for number, _, _, text in first["generated"]] == [(0, "text one"), (2, "text three")]
    assert (second["source"], second["target"]) == ("source 1", "target two")
    assert [(number, text) for number, _, _, text in second["generated"]] == [(1, "text two")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("records", "shown"),
    [
        ([], "Nothing has been logged yet."),
        ([step_record(10)], "17,500"),
        ([step_record(10, loss=None, rank_seconds=[1.0])], "17,500"),
        ([evaluation_record(0, rouge1=None)], "7.0000"),
        ([{"step": 0, "validation_loss": 7.0}], "7.0000"),
        ([evaluation_record(0, gradient_by_distance=[0.0, 0.0])], "7.0000"),
        ([step_record(n, rank_seconds=[1.0] * 32) for n in range(1, 2001)], "17,500"),
    ],
    ids=["nothing", "no evaluation", "no loss, one process", "no ROUGE", "no recurrence", "no gradient", "long"],
)
def test_an_unfinished_run_is_reported(records, shown, tmp_path, make_page):
    folder = write_run(tmp_path / "run", records)
    if records:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "lo')
    page = make_page(folder)
    assert shown in page.texts
    assert follows(page, "state") == "still running, or killed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (75, "SIGTERM", "stopped: SIGTERM"),
        (1, "no memory", "ended by a fault: no memory"),
        (2, "x", "ended by a mistake in a flag or file: x"),
    ],
)
def test_the_page_says_how_a_run_ended(code, reason, said, tmp_path, make_page):
    run = write_run(tmp_path / "run", RECORDS[1:2])
    (run / "outcome.json").write_text(json.dumps({"code": code, "reason": reason, "step": 20}))
    page = make_page(run)
    assert follows(page, "state") == said
    assert "time left" not in page.texts


@pytest.mark.slow
def test_the_page_of_a_long_run_is_small(tmp_path, make_page):
    records = [step_record(n, rank_seconds=[1.0] * 32) for n in range(1, 2001)]
    make_page(write_run(tmp_path / "run", records))
    assert (tmp_path / "out" / "page.html").stat().st_size < 1.5e6


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_run(tmp_path, {})
