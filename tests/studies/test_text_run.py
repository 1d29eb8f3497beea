"""A run on documents: launch/train.py is told what to do, goes on where it was stopped, and its log is read."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest

from recurrent_bart.studies.report import read_results
from recurrent_bart.studies.study_run import RunFile
from recurrent_bart.studies.text_report import draw_losses, loss_table, text_report
from recurrent_bart.studies.text_run import TextRun, evaluations, execute_text
from runs import flags

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


@pytest.fixture
def make_run(documents):
    """Makes a run of few steps; further flags may be given."""

    def make(**changes):
        words = flags(documents, "", **changes)
        named = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
        return TextRun("layerwise", "papers document", {k: v for k, v in named.items() if k != "output_dir"}, seed=5)

    return make


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_ran_out_of_time_goes_on_from_there(make_run, tmp_path):
    file, run = RunFile(tmp_path / "run.json"), make_run(max_steps=4)
    file.begin(run)
    # it stops before its first step
    execute_text(file, TRAIN, "cpu", budget_seconds=0.1)
    assert (file.read()["stopped"], file.is_finished(run)) == ("budget", False)
    file.begin(run)
    execute_text(file, TRAIN, "cpu", math.inf)
    record = file.read()
    assert (record["stopped"], file.is_finished(run), record["device"]) == ("steps", True, "cpu")
    assert [point["step"] for point in record["curve"]] == [0, 2, 4]
    assert record["curve"][2]["seconds"] > record["curve"][1]["seconds"] > record["curve"][0]["seconds"] == 0
    assert {"validation_loss", "rouge1", "rougeL"} <= set(record["curve"][2])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["arguments"]["run"]["seed"] == 5


def test_a_run_folder_of_other_flags_is_not_gone_on_from(make_run, tmp_path):
    file, run = RunFile(tmp_path / "run.json"), make_run(max_steps=4)
    file.begin(run)
    (tmp_path / "run").mkdir()
    saved = {"arguments": {"all": run.flags | {"segment_size": 99}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="was begun with --segment_size 99"):
        execute_text(file, TRAIN, "cpu", math.inf)


def test_training_that_fails_is_no_result(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(2)")
    file = RunFile(tmp_path / "run.json")
    file.begin(TextRun("a", "papers", {}))
    with pytest.raises(ValueError, match=r"train\.py ended with exit code 2"):
        execute_text(file, script, "cpu", math.inf)
    assert "stopped" not in file.read()


def test_a_device_is_the_one_that_training_sees(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); exit(2)"
    )
    file = RunFile(tmp_path / "run.json")
    file.begin(TextRun("a", "papers", {}))
    for device, seen in (("cuda:3", "3"), ("cpu", "")):
        with pytest.raises(ValueError, match="exit code 2"):
            execute_text(file, script, device, math.inf)
        assert (tmp_path / "seen").read_text() == seen


def test_time_is_that_of_steps_alone():
    log = [
        {"step": 0, "validation_loss": 9.0},
        {"step": 2, "step_seconds": 1.0, "loss": 1.0},
        {"step": 3, "step_seconds": 2.0, "loss": 1.0},
        {"step": 3, "validation_loss": 8.0, "rouge1": 5.0, "evaluation_seconds": 99.0},
    ]
    assert evaluations(log) == [
        {"seconds": 0.0, "step": 0, "validation_loss": 9.0},
        {"seconds": 4.0, "step": 3, "validation_loss": 8.0, "rouge1": 5.0},
    ]


@pytest.fixture
def groups(tmp_path):
    """A slow model of two seeds that ends lower, and a fast one."""
    curves = {
        ("slow", 0): [(0, 0, 9.0), (10, 50, 5.0), (20, 100, 3.0)],
        ("slow", 1): [(0, 0, 9.0), (10, 40, 4.0), (20, 80, 2.0)],
        ("fast", 0): [(0, 0, 9.0), (10, 30, 3.0), (20, 60, 3.5)],
    }
    runs = []
    for (name, seed), points in curves.items():
        run = TextRun(name, "papers document", {}, seed)
        curve = [{"step": s, "seconds": t, "validation_loss": loss, "rouge1": 10 * loss} for s, t, loss in points]
        origin = {
            "device": "cpu",
            "versions": {"torch": "2", "transformers": "5"},
            "git_commit": "abc",
            "date": "today",
        }
        record = {"run": vars(run), **origin, "stopped": "steps", "curve": curve}
        (tmp_path / run.file_name()).write_text(json.dumps(record))
        runs.append(run)
    return read_results(tmp_path, runs)


def test_models_are_compared_at_equal_steps_and_at_equal_time(groups):
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in loss_table(groups).splitlines()]
    assert table[2] == [
        *("papers document", "slow", "2", "20", "90 (80 to 100)"),
        *("2.500 (2.000 to 3.000)", "4.500 (4.000 to 5.000)", "25.0 (20.0 to 30.0)", "", ""),
    ]
    assert table[3] == ["papers document", "fast", "1", "20", "60", "3.000", "3.000", "30.0", "", ""]
    assert "commit abc" in text_report(groups)


def test_losses_are_drawn(groups, tmp_path):
    draw_losses(groups, tmp_path / "losses.png")
    assert matplotlib.image.imread(tmp_path / "losses.png").std() > 0.01
