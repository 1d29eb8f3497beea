"""`launch/study.py`: runs what is not done, keeps what there is, and reports on all."""

import json
import sys
from pathlib import Path

import pytest

from launching import load_script, run

SCRIPT = Path(__file__).parents[2] / "launch" / "study.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SHORT = ["quick", "--seeds", "1", "--max_steps", "2"]


@pytest.fixture(scope="module")
def script():
    return load_script("study")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study whose two runs are done, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    code, output = run([sys.executable, SCRIPT, *SHORT, "--output_dir", folder, "--processes_per_device", 2], 120)
    assert code == 0, output
    return folder, output


def test_a_study_leaves_a_file_for_each_run_a_report_and_a_plot(study):
    folder, output = study
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert {record["run"]["name"] for record in records} == {"layerwise", "BART, last segment"}
    assert all(record["stopped"] == "steps" and record["steps"] == 2 for record in records)
    assert "2 runs, 0 of them finished before; 2 at once" in output
    assert "steps after 2 steps" in output
    text = (folder / "report.md").read_text()
    assert text in output
    assert text.index("layerwise") < text.index("BART, last segment")
    assert (folder / "accuracy.png").stat().st_size > 1000


@pytest.fixture
def started(script, monkeypatch):
    """Names of the files whose runs a study would start, each time it is run; none is."""
    names = []
    monkeypatch.setattr(
        script, "run_side_by_side", lambda files, *_: iter(names.append([file.stem for file in files]) or [])
    )
    return names


def test_what_is_finished_is_not_run_again(study, script, started):
    folder, _ = study
    before = {file: file.read_text() for file in folder.glob("*.json")}
    assert script.main([*SHORT, "--output_dir", str(folder)]) == 0
    assert started == [[]]
    assert {file: file.read_text() for file in folder.glob("*.json")} == before


def test_runs_that_are_new_cut_off_or_defined_otherwise_are_started(study, script, started, tmp_path):
    folder, _ = study
    for file in folder.glob("*.json"):
        record = json.loads(file.read_text())
        if record["run"]["window"] == "last":
            record["stopped"] = "budget"
        (tmp_path / file.name).write_text(json.dumps(record))
    flags = ["--output_dir", str(tmp_path)]
    script.main([*SHORT, *flags])
    script.main(["quick", "--seeds", "2", "--max_steps", "2", "--only", "layerwise", *flags])
    script.main(["quick", "--seeds", "1", "--max_steps", "3", "--only", "layerwise", *flags])
    task = "copy-n_payload=4-n_symbols=8-n_fillers=4"
    assert started == [
        [f"{task}-BART-last-segment-seed0"],
        [f"{task}-layerwise-seed1"],
        [f"{task}-layerwise-seed0"],
    ]


def test_of_a_run_that_cannot_start_what_there_was_stays(study, script, tmp_path, capsys):
    folder, _ = study
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_text(json.dumps(json.loads(file.read_text()) | {"stopped": "budget"}))
    assert script.main([*SHORT, "--output_dir", str(tmp_path), "--budget_seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "not started, the time is over" in printed
    assert "2 of 2 runs were cut off" in printed


def test_a_report_is_made_again_without_a_run(study, script, started, capsys):
    folder, _ = study
    text = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    assert script.main([*SHORT, "--output_dir", str(folder), "--report_only"]) == 0
    assert started == []
    assert (folder / "report.md").read_text() == text
    assert text in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_are_reported(tmp_path, script, monkeypatch, capsys):
    def worker(file, *_):
        return [sys.executable, "-c", "import sys; sys.exit('out of luck')"] if "BART" in file.stem else real(file, *_)

    real = script.worker
    monkeypatch.setattr(script, "worker", worker)
    assert script.main([*SHORT, "--output_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "seed0: failed with exit code 1: out of luck" in printed
    assert "| layerwise | 1 |" in printed


def test_places_are_shared_evenly(script, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    assert script.find_places(None, 2) == ["cuda:0", "cuda:1"] * 2
    assert script.find_places(1, None) == ["cuda:0"] * 8
    assert script.find_places(0, None) == ["cpu"]
    with pytest.raises(ValueError, match="--devices 3: there are 2"):
        script.find_places(3, None)


def test_a_study_of_documents_trains_every_model_and_compares_them(documents, tmp_path):
    small = {"segment_size": 16, "max_n_segments": 4, "vocab_size": 320, "pre_seq_len": 3, "max_target_length": 8}
    small |= {"model_size": "tiny", "per_device_train_batch_size": 2, "eval_every": 1, "eval_documents": 2}
    small |= {"cache_dir": documents / "cache", "dataloader_num_workers": 0}
    flags = ["--dataset", documents, "--seeds", 1, "--max_steps", 2, "--only", "BART", "--processes_per_device", 2]
    changed = [f"{name}={value}" for name, value in small.items()]
    code, output = run([sys.executable, SCRIPT, "sections", "--output_dir", tmp_path, *flags, "--set", *changed], 240)
    assert code == 0, output
    assert output.count("steps after 2 steps") == 2
    text = (tmp_path / "report.md").read_text()
    assert text in output
    assert "| BART, last segment of each section | 1 | 2 |" in text
    assert (tmp_path / "losses.png").stat().st_size > 1000
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert all(record["run"]["seconds"] == 300 and record["texts"] for record in records)


def test_documents_are_made_ready_before_runs_that_start_together(script, monkeypatch, started, tmp_path):
    prepared = []
    monkeypatch.setattr("recurrent_bart.studies.text_training.prepare_documents", prepared.append)
    flags = ["document", "--seconds", "7", "--set", "model_size=base", "--output_dir", str(tmp_path)]
    assert script.main(flags) == 1
    assert [(run.seconds, run.flags["model_size"]) for run in prepared] == [(7.0, "base")]
    assert len(started[0]) == 3 * 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["quik"], "study quik: known are quick"),
        ([], "study None: known are quick"),
        (["babi"], "--facts and --filler"),
        (["quick", "--only", "rmt"], "no run with 'rmt' in its file name"),
        (["quick", "--report_only", "--output_dir", "nowhere"], "nowhere: no run came to its end"),
        (["--run", "nowhere.json"], "nowhere.json: unreadable"),
        (["document", "--set", "seed"], "--set seed: must be NAME=VALUE"),
        (["document", "--set", "segment_sise=4"], "unknown argument --segment_sise=4; did you mean --segment_size?"),
    ],
)
def test_a_mistake_is_one_line(script, capsys, flags, message):
    assert script.main(flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_worker_loads_nothing_that_it_does_not_need():
    program = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    code, output = run([sys.executable, "-c", program, SCRIPT], timeout=60)
    assert code == 0, output
    assert not {"deepspeed", "wandb", "datasets", "rich", "rouge_score"} & set(output.split())
