"""Models are compared at equal time and at equal data, on their common targets, with intervals."""

import json
import re

import matplotlib.image
import pytest

from recurrent_bart.studies.documents.report import (
    draw_losses,
    equal_seconds,
    equal_step,
    place,
    text_report,
    with_common_seeds,
)
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.report import read_results

# three targets in two documents: 2, 2 and 4 tokens
TARGETS = [
    {"document": "a", "target": 0, "position": 300, "n_tokens": 2},
    {"document": "a", "target": 1, "position": 900, "n_tokens": 2},
    {"document": "b", "target": 0, "position": 500, "n_tokens": 4},
]
ORIGIN = {"device": "cpu", "versions": {"torch": "2", "transformers": "5"}, "git_commit": "abc", "date": "today"}
# (model, seed) -> (step, seconds, loss per token of each of the three targets)
CURVES = {
    ("ours", 0): [(10, 50, (3.0, 3.0, 3.0)), (20, 100, (1.0, 2.0, 2.0))],
    ("ours", 1): [(10, 40, (3.0, 3.0, 3.0)), (20, 101, (1.0, 2.0, 2.0))],
    ("fast", 0): [(10, 20, (2.5, 2.5, 2.5)), (20, 40, (1.5, 2.5, 3.5)), (30, 100, (9.0, 9.0, 9.0))],
    ("fast", 1): [(10, 20, (2.5, 2.5, 2.5)), (20, 40, (1.5, 2.5, 3.5)), (30, 100, (1.0, 1.0, 1.0))],
}


def write_record(folder, name, seed, points, targets=TARGETS, **changes):
    run = TextRun(name, "papers sections", {}, seed)
    curve = [
        {"step": step, "seconds": seconds, "n_tokens": 1000 * step, "validation_loss": loss_of(losses, targets)}
        | {"target_losses": [loss * target["n_tokens"] for loss, target in zip(losses, targets, strict=False)]}
        for step, seconds, losses in points
    ]
    texts = [{"document": "a", "target": n, "rouge1": 10.0 + seed, "rouge2": 2.0, "rougeL": 3.0} for n in (0, 1)]
    record = {"run": vars(run), **ORIGIN, "n_parameters": 2_000_000, "peak_bytes": None, "stopped": "time"}
    record |= {"targets": targets, "curve": curve, "texts": texts} | changes
    (folder / run.file_name()).write_text(json.dumps(record))
    return run


def loss_of(losses, targets):
    pairs = list(zip(losses, targets, strict=False))
    return sum(loss * t["n_tokens"] for loss, t in pairs) / sum(t["n_tokens"] for _, t in pairs)


@pytest.fixture
def groups(tmp_path):
    """Return a slow model, and a fast one with one seed that gets worse at the end."""
    return read_results(tmp_path, [write_record(tmp_path, *key, points) for key, points in CURVES.items()])


def rows_of(text, title):
    """Return the cells of the first table after a title, with the header first."""
    table = re.search(r"\|.*\|\n(\|.*\|\n)+", text[text.index(title) :])[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def means(cell):
    """Return the numbers of a cell without their intervals."""
    return [float(number) for number in re.sub(r"\[.*?\]", "", cell).split()]


def test_at_equal_time_each_has_its_best_evaluation(groups):
    """Check that a seed that gets worse counts with its best evaluation."""
    head, ours, fast = rows_of(text_report(groups), "equal time: 100 s")
    assert head == ["model", "seeds", "steps", "seconds", "M tokens read", "loss", "difference"]
    assert ours[:5] == ["ours", "2", "20", "100", "0.0"]
    assert means(ours[5]) == [1.75]
    assert ours[6] == ""
    # best losses: 2.5 after 10 steps for seed 0, 1.0 after 30 steps for seed 1
    assert fast[:4] == ["fast", "2", "20", "60"]
    assert means(fast[5]) == [1.75]
    assert means(fast[6]) == [0.0]


def test_at_equal_data_all_have_done_the_same_steps(groups):
    _, ours, fast = rows_of(text_report(groups), "equal data: 20 steps")
    assert means(ours[5]) == [1.75]
    assert (fast[2], means(fast[5]), means(fast[6])) == ("10", [2.5], [0.75])
    # with both seeds, the loss is 1.0 higher on document a and 0.5 higher on document b
    assert fast[6] == "+0.750 [+0.500, +1.000]"


def test_loss_is_told_by_where_targets_stand(groups):
    head, ours, fast = rows_of(text_report(groups), "Loss and difference at equal time, by position")
    assert head == ["model", "to 512 (2)", "to 1,024 (1)"]
    assert [means(cell) for cell in ours[1:]] == [[pytest.approx(10 / 6, abs=1e-3)], [2.0]]
    assert [means(cell) for cell in fast[1:]] == [[1.75, pytest.approx(0.083)], [1.75, -0.25]]
    assert [place(position) for position in (1, 512, 513, 1024, 5000)] == [512, 512, 1024, 1024, 8192]


def test_texts_are_compared_where_all_have_them(groups):
    head, ours, fast = rows_of(text_report(groups), "ROUGE F-measure")
    assert head == ["model (2 texts)", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert [means(cell) for cell in ours[1:]] == [[10.5], [2.0], [3.0]]
    assert means(fast[1]) == [10.5, 0.0]


def test_cost_and_origin_are_told(groups):
    text = text_report(groups)
    assert rows_of(text, "Cost")[1:] == [["ours", "2.0", "0.20", "199", ""], ["fast", "2.0", "0.30", "300", ""]]
    assert "commit abc" in text


def test_only_what_all_have_is_compared(tmp_path):
    """Compare models when one lacks a seed and a target."""
    runs = [write_record(tmp_path, "ours", seed, CURVES["ours", seed]) for seed in (0, 1)]
    runs.append(write_record(tmp_path, "short", 1, [(20, 100, (5.0, 5.0))], TARGETS[:2]))
    _, ours, short = rows_of(text_report(read_results(tmp_path, runs)), "equal time")
    assert (ours[1], means(ours[5]), means(short[5]), means(short[6])) == ("1", [1.5], [5.0], [3.5])


def test_without_a_common_seed_nothing_is_compared(tmp_path):
    runs = [write_record(tmp_path, "ours", 0, CURVES["ours", 0]), write_record(tmp_path, "fast", 1, CURVES["fast", 1])]
    with pytest.raises(ValueError, match="no seed has a finished run of every model"):
        text_report(read_results(tmp_path, runs))


def test_what_was_cut_off_early_bounds_what_is_equal(tmp_path):
    runs = [write_record(tmp_path, *key, points) for key, points in CURVES.items()]
    runs.append(write_record(tmp_path, "late", 0, [(7, 30, (2.0, 2.0, 2.0))]))
    groups = read_results(tmp_path, runs)
    records = with_common_seeds({name: own for (_, name), own in groups.items()})
    assert (equal_seconds(records), equal_step(records)) == (30, 0)
    text = text_report(groups)
    _, ours, fast, late = rows_of(text, "equal time: 30 s")
    # our model was not evaluated before 30 s
    assert ours == ["ours", "1", "", "", "", "", ""]
    assert (means(fast[5]), means(late[5])) == ([2.5], [2.0])
    assert fast[6] == late[6] == ""


def with_seed_differences(folder, differences):
    """Write two models on three documents; `differences` are added to the second model's loss, one per seed."""
    targets = [{"document": name, "target": 0, "position": 300, "n_tokens": 2} for name in "abc"]
    runs = []
    for seed, difference in enumerate(differences):
        runs.append(write_record(folder, "ours", seed, [(20, 100, (1.0 + seed, 2.0, 3.0))], targets))
        losses = 1.0 + seed + difference, 2.0 + difference, 3.0 + difference
        runs.append(write_record(folder, "other", seed, [(20, 100, losses)], targets))
    return runs


@pytest.mark.parametrize("is_reversed", [False, True])
def test_differences_of_seeds_make_a_paired_t_interval(tmp_path, is_reversed):
    """Expect 0.657: 0.1, 0.2 and 0.6 have standard deviation 0.2646, and 4.303 * 0.2646 / sqrt(3) is 0.657."""
    runs = with_seed_differences(tmp_path, [0.1, 0.2, 0.6])
    # the report finds the seeds of one model in reverse order
    runs = [*runs[::2], *(runs[::-2] if is_reversed else runs[1::2])]
    text = text_report(read_results(tmp_path, runs))
    _, _, other = rows_of(text, "equal time: 100 s")
    assert other[6] == "+0.300 [-0.357, +0.957]"
    head, loss, *scores = rows_of(text, "Intervals of the differences")
    assert head == ["model", "difference of", "over documents", "over seeds"]
    # all documents have the same difference, so the interval over documents has width 0
    assert loss == ["other", "loss", "+0.300 [+0.300, +0.300]", "+0.300 [-0.357, +0.957]"]
    assert [row[1] for row in scores] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]


def test_with_one_seed_intervals_are_over_documents(tmp_path):
    runs = with_seed_differences(tmp_path, [0.1])
    _, loss, *_ = rows_of(text_report(read_results(tmp_path, runs)), "Intervals of the differences")
    assert loss[2:] == ["+0.100 [+0.100, +0.100]", "+0.100"]


@pytest.mark.parametrize("part", ["targets", "texts"])
def test_documents_with_one_id_are_refused(tmp_path, part):
    """Refuse files of an earlier version, whose report would count only one of both documents."""
    rows = {"targets": [TARGETS[0], TARGETS[2], TARGETS[0]]}
    rows["texts"] = [{"document": "a", "target": 0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}] * 2
    runs = [write_record(tmp_path, "ours", 0, CURVES["ours", 0], **{part: rows[part]})]
    with pytest.raises(ValueError, match="document 'a' has two targets with number 0"):
        text_report(read_results(tmp_path, runs))


def test_losses_are_drawn(groups, tmp_path):
    draw_losses(groups, tmp_path / "losses.png")
    assert matplotlib.image.imread(tmp_path / "losses.png").std() > 0.01


def test_the_loss_with_foreign_states_is_compared_with_the_best_loss(tmp_path):
    """The best evaluation has a loss of (2 * 1 + 2 * 2 + 4 * 2) / 8 = 1.75; each target's sum rises by 0.8."""
    points = CURVES["ours", 0]
    foreign = [loss * target["n_tokens"] + 0.8 for loss, target in zip(points[-1][2], TARGETS, strict=True)]
    with_state = write_record(tmp_path, "with a state", 0, points, foreign_state_losses=foreign)
    without = write_record(tmp_path, "without", 0, points, foreign_state_losses=None)
    report = text_report(read_results(tmp_path, [with_state, without]))
    (line,) = [line for line in report.splitlines() if "| 1.750" in line and "| 2.050" in line]
    assert line.startswith("| with a state | 1.750 [")
    assert "+0.300 [" in line
    report = text_report(read_results(tmp_path, [without]))
    assert "with foreign states" not in report
