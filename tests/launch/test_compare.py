"""`launch/compare.py` pairs texts by id, prints differences with intervals, and writes pages."""

import csv
import json
import re
from dataclasses import replace

import pytest

from launching import load_script
from recurrent_bart.evaluation.predictions import Prediction, read_predictions, write_predictions
from reported_runs import Page

SHARES = {"text": None, "target": None}
N_DOCUMENTS = 12


@pytest.fixture(scope="module")
def script():
    return load_script("compare")


@pytest.fixture
def compare(script, tmp_path, monkeypatch, capsys):
    """Return a function that compares files of the test's folder and returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (script.main(list(map(str, arguments))), *capsys.readouterr())


def prediction(number, rouge1, system, **changes):
    scores = {"rouge1": rouge1, "rouge2": rouge1 / 2, "novel_4grams": None}
    found = Prediction(
        f"d{number}", f"d{number}", None, 1, 9, 9, [f"target {number}"], f"{system} {number}", scores, SHARES
    )
    return replace(found, **changes)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file of predictions whose text n scores `shift + n`."""

    def write(name, shift=0.0, n=N_DOCUMENTS, **changes):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        system = name.split("/")[0].split(".")[0]
        write_predictions(file, [prediction(number, shift + number, system, **changes) for number in range(n)])
        return file

    return write


def rows(printed):
    """Return the printed rows by score and system."""
    found = [re.split(r" {2,}", line) for line in printed.splitlines() if line.startswith(("rouge", "n_", "novel"))]
    return {(row[0], row[1]): row[2:] for row in found}


def test_differences_are_paired_by_text(compare, write):
    """All texts gain 2, so that the interval of the difference has no width."""
    write("bart/predictions.jsonl")
    write("ours/predictions.jsonl", 2.0)
    code, printed, _ = compare("bart", "ours")
    assert code == 0
    assert printed.startswith("12 texts of 12 documents. Differences are to bart, paired by text. Brackets hold 95 %")
    assert rows(printed) == {
        ("rouge1", "bart"): ["5.50"],
        ("rouge1", "ours"): ["7.50", "+2.00 [+2.00, +2.00]"],
        ("rouge2", "bart"): ["2.75"],
        ("rouge2", "ours"): ["3.75", "+1.00 [+1.00, +1.00]"],
    }


def test_seeds_give_the_paired_t_interval(compare, write):
    """The gains are 1.5, 2.3 and 3.1; by hand, 4.303 * 0.8 / sqrt(3) is 1.987."""
    for seed, (first, second) in enumerate([(23.7, 25.2), (24.5, 26.8), (22.7, 25.8)]):
        write(f"b{seed}.predictions.jsonl", first)
        write(f"o{seed}.predictions.jsonl", second)
    bart, ours = (",".join(f"{letter}{seed}.predictions.jsonl" for seed in range(3)) for letter in "bo")
    code, printed, _ = compare(f"bart={bart}", f"ours={ours}")
    assert code == 0
    assert "paired by text and by 3 seeds" in printed
    both, documents, seeds = rows(printed)["rouge1", "ours"][1:]
    assert seeds == both == "+2.30 [+0.31, +4.29]"
    assert documents == "+2.30 [+2.30, +2.30]"


def test_a_score_counts_where_every_file_has_it(compare, write, tmp_path):
    first, second = write("a.predictions.jsonl"), write("b.predictions.jsonl", 1.0)
    texts = read_predictions(second)
    texts[11] = replace(texts[11], scores=texts[11].scores | {"rouge1": None})
    write_predictions(second, texts)
    code, printed, _ = compare(first, second)
    assert code == 0
    assert rows(printed)["rouge1", "a"] == ["5.00"]
    assert rows(printed)["rouge1", "b"] == ["6.00", "+1.00 [+1.00, +1.00]"]


def test_a_score_that_a_later_line_lacks_is_left_out(compare, write):
    first, second = write("a.predictions.jsonl"), write("b.predictions.jsonl", 1.0)
    texts = read_predictions(second)
    texts[5] = replace(texts[5], scores={"rouge1": 9.0})
    write_predictions(second, texts)
    code, printed, error = compare(first, second)
    assert code == 0, error
    assert {score for score, _ in rows(printed)} == {"rouge1"}
    code, _, error = compare(first, second, "--sort_by", "rouge2")
    assert code == 2
    assert "error: --sort_by rouge2: the files have the scores rouge1" in error


def test_systems_agree_about_the_document_of_each_text(compare, write):
    """The first file alone must not decide which texts are resampled together."""
    first, second = write("a.predictions.jsonl"), write("b.predictions.jsonl", 1.0)
    texts = [replace(item, document="d0") for item in read_predictions(second)]
    write_predictions(second, texts)
    code, _, error = compare(first, second)
    assert code == 2
    assert "error: b.predictions.jsonl: the document of d1 is 'd0', but 'd1' in a.predictions.jsonl; " in error.replace(
        f"{first.parent}/", ""
    )


def test_the_page_shows_the_texts_that_differ_most_first(compare, write, tmp_path):
    first, second = write("bart.predictions.jsonl"), write("ours.predictions.jsonl")
    texts = read_predictions(second)
    for number, rouge1 in ((3, 40.0), (7, 0.0)):
        scores = texts[number].scores | {"rouge1": rouge1}
        texts[number] = replace(texts[number], scores=scores, source="<b>the source</b>")
    write_predictions(second, texts)
    code, printed, _ = compare(first, second, "--n_texts", 2, "--output", tmp_path / "page.html")
    assert code == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    titles = [text for text in page.texts if re.fullmatch(r"d\d+, 9 tokens", text)]
    assert titles == ["d3, 9 tokens", "d7, 9 tokens"]
    assert page.texts.index("bart 3") < page.texts.index("ours 3") < page.texts.index("target 3")
    assert "ours, rouge1 40.0" in page.texts
    assert "<b>the source</b>" in page.texts
    # The gains are 40 - 3 and 0 - 7, of 12 texts.
    difference = rows(printed)["rouge1", "ours"][1]
    assert difference.startswith("+2.50 [")
    assert {"ROUGE-1: F-measure of words, or of characters in scripts without spaces, in percent", difference} <= set(
        page.texts
    )
    # The page loads nothing.
    assert {link[:5] for link in re.findall(r'(?:src|href)="(?!#)([^"]*)"', html)} == {"data:"}
    assert "default-src 'none'" in html


def test_the_chart_shows_names_as_they_are_written(compare, write, tmp_path):
    write("a.jsonl")
    for name in ("b.jsonl", "c.jsonl"):
        write(name, 1.0)
    names = ["1 $x^2$ <b>", "_hidden $\\frac$", "lr $0.1"]
    code, _, error = compare(*(f"{name}={file}.jsonl" for name, file in zip(names, "abc", strict=True)))
    assert code == 0, error
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    drawn = [text.strip() for text in Page(html[html.index("<svg") : html.index("</svg>") + 6]).texts]
    assert {f"rouge1: difference to {names[0]}", *names[1:]} <= set(drawn)


def test_pages_show_the_question(compare, write, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(name, query="What was <decided>?")
    assert read_predictions(tmp_path / "a.jsonl")[0].query == "What was <decided>?"
    assert compare("a.jsonl", "b.jsonl", "--n_texts", 1, "--blind", "blind", "--n_pairs", 1)[0] == 0
    for page in (tmp_path / "compare.html", tmp_path / "blind" / "pairs.html"):
        assert page.read_text().count("question: What was &lt;decided&gt;?") == 1
    assert '"query"' not in write("c.jsonl").read_text()


def test_blind_pairs_hide_the_systems(compare, write, tmp_path):
    write("bart/predictions.jsonl")
    write("ours/predictions.jsonl", 2.0)
    texts = [
        replace(item, text=f"text {item.id} of x") for item in read_predictions(tmp_path / "bart/predictions.jsonl")
    ]
    write_predictions(tmp_path / "bart/predictions.jsonl", texts)
    others = [replace(item, text=item.text.replace("of x", "of y")) for item in texts]
    # Equal texts are no pair.
    others[0] = texts[0]
    write_predictions(tmp_path / "ours/predictions.jsonl", others)
    code, printed, _ = compare("bart", "ours", "--blind", "pairs", "--n_pairs", 10)
    assert code == 0, printed
    html = (tmp_path / "pairs" / "pairs.html").read_text()
    assert "bart" not in html
    assert "ours" not in html
    key = list(csv.DictReader((tmp_path / "pairs" / "key.csv").open()))
    answers = list(csv.DictReader((tmp_path / "pairs" / "pairs.csv").open()))
    assert [row["pair"] for row in key] == [row["pair"] for row in answers] == [str(n) for n in range(1, 11)]
    assert {row["preferred"] for row in answers} == {""}
    assert "d0" not in {row["id"] for row in key}
    # Each system is A in some pairs, and documents are not in their order.
    assert {(row["A"], row["B"]) for row in key} == {("bart", "ours"), ("ours", "bart")}
    assert [row["id"] for row in key] != sorted(row["id"] for row in key)
    shown = Page(html).texts
    for row in key:
        expected = {"bart": f"text {row['id']} of x", "ours": f"text {row['id']} of y"}
        assert shown.index(f"pair {row['pair']}") < shown.index(expected[row["A"]]) < shown.index(expected[row["B"]])
    before = (tmp_path / "pairs" / "key.csv").read_text()
    assert compare("bart", "ours", "--blind", "again", "--n_pairs", 10)[0] == 0
    assert (tmp_path / "again" / "key.csv").read_text() == before
    assert compare("bart", "ours", "--blind", "other", "--n_pairs", 10, "--seed", 1)[0] == 0
    assert (tmp_path / "other" / "key.csv").read_text() != before
    # answers are never overwritten
    code, _, error = compare("bart", "ours", "--blind", "pairs", "--seed", 1)
    assert code == 2
    assert error.startswith("error: --blind pairs: the folder has pairs.csv, perhaps with answers; give a new folder")
    assert (tmp_path / "pairs" / "key.csv").read_text() == before


def test_systems_have_different_names(compare, write):
    for name in ("bart/predictions.jsonl", "new/bart.predictions.jsonl", "new/predictions.jsonl"):
        write(name)
    code, printed, _ = compare("bart", "new/bart.predictions.jsonl", "new", "bart=new")
    assert code == 0
    assert [system for score, system in rows(printed) if score == "rouge1"] == ["bart", "bart (2)", "new", "bart (3)"]


def test_a_path_may_contain_signs(compare, write):
    write("lr=3,x/predictions.jsonl")
    write("b/predictions.jsonl", 1.0)
    code, printed, _ = compare("lr=3,x", "ours=lr=3,x")
    assert code == 0
    assert [system for score, system in rows(printed) if score == "rouge1"] == ["lr=3,x", "ours"]


def change(file, **changes):
    records = [json.loads(line) | changes for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_texts_that_cannot_be_paired_are_named(compare, write):
    write("all.predictions.jsonl")
    write("few.predictions.jsonl", n=7)
    message = "few.predictions.jsonl: no predictions for d7, d8, d9 and 2 more, which all.predictions.jsonl has"
    assert compare("all.predictions.jsonl", "few.predictions.jsonl")[::2] == (2, f"error: {message}\n")
    assert compare("few.predictions.jsonl", "all.predictions.jsonl")[::2] == (2, f"error: {message}\n")
    change(write("other.predictions.jsonl"), targets=["another"])
    message = "other.predictions.jsonl: the target of d0 differs from the one in all.predictions.jsonl"
    assert compare("all.predictions.jsonl", "other.predictions.jsonl")[::2] == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "one system is given: give at least two, the first of which is the reference"),
        (
            ["a", "missing.jsonl"],
            "missing.jsonl: unreadable predictions ([Errno 2] No such file or directory: 'missing",
        ),
        (["a", "empty"], "empty: the folder has no predictions.jsonl; name the file"),
        (["a", "two"], "two: the folder has several: x.predictions.jsonl, y.predictions.jsonl; name the file"),
        (
            ["a", "b=a,a"],
            "the systems have different numbers of files (a: 1, b: 2): give the same seeds of each system",
        ),
        (["a", "a", "--sort_by", "bleu"], "--sort_by bleu: the files have the scores rouge1, rouge2, novel_4grams"),
        (["a", "a", "--n_texts", "0"], "--n_texts 0: must be at least 1"),
        (["a", "a", "--output", "missing/x.html"], "missing/x.html.tmp: cannot be written (No such file or directory)"),
        (["a", "a", "--blind", "pairs"], "--blind pairs: all texts of the systems are equal"),
        (["a", "b=a,"], "b=a,: a comma joins two files, so a file must stand before and behind it"),
        # together longer than the name of a file can be
        (
            ["a", "b=" + ",".join(["a/predictions.jsonl"] * 30)],
            "the systems have different numbers of files (a: 1, b: ",
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(arguments, message, compare, write, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a/predictions.jsonl", "two/x.predictions.jsonl", "two/y.predictions.jsonl"):
        write(name)
    code, _, error = compare(*arguments)
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
