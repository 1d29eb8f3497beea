"""`launch/study.py` does unfinished runs only, keeps existing results, and reports on all runs."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from forked import run_script
from launching import load_script, run
from recurrent_bart.commands.study import build_parser, find_runs
from recurrent_bart.studies.definitions import Texts
from recurrent_bart.studies.memory import single_run
from recurrent_bart.studies.pool import Ended
from study_runs import begun, short_run

SCRIPT = Path(__file__).parents[2] / "launch" / "study.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
CASES = [(False, "cpu"), (False, "cuda:0"), (True, "cpu"), (True, "cuda:0")]
SHORT = ["quick", "--seeds", "1", "--max_steps", "2"]


@pytest.fixture(scope="module")
def script():
    return load_script("study")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Do a study of two runs; return its folder and its output."""
    folder = tmp_path_factory.mktemp("study")
    ended = run_script(SCRIPT, *SHORT, "--output_dir", folder, "--processes_per_device", 2, timeout=120)
    assert ended.codes == [0], ended.text()
    return folder, ended.text()


def test_a_study_leaves_a_file_for_each_run_a_report_and_a_plot(study):
    folder, output = study
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert {record["run"]["name"] for record in records} == {"layerwise", "BART, last segment"}
    assert all(record["stopped"] == "steps" and record["steps"] == 2 for record in records)
    assert "2 runs, 0 already finished; 2 processes, runs at once in each process: 1" in output
    assert "steps after 2 steps" in output
    text = (folder / "report.md").read_text()
    assert text in output
    assert text.index("layerwise") < text.index("BART, last segment")
    assert (folder / "accuracy.png").stat().st_size > 1000


@pytest.fixture
def started(script, monkeypatch):
    """Return the file names of the runs that a study would start, without starting them."""
    names = []
    monkeypatch.setattr(
        script,
        "run_side_by_side",
        lambda groups, *_: iter(names.append([file.stem for files in groups for file in files]) or []),
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
    assert "not started: the time limit is reached" in printed
    assert "2 of 2 runs stopped at the time limit" in printed


def test_a_report_is_made_again_without_a_run(study, script, started, capsys):
    folder, _ = study
    text = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    assert script.main([*SHORT, "--output_dir", str(folder), "--report_only"]) == 0
    assert started == []
    assert (folder / "report.md").read_text() == text
    assert text in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_others_are_reported(tmp_path, script, monkeypatch, capsys):
    def worker(files, *_, **flags):
        failing = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
        return failing if "BART" in files[0].stem else real(files, *_, **flags)

    real = script.worker
    monkeypatch.setattr(script, "worker", worker)
    assert script.main([*SHORT, "--output_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "seed0: failed with exit code 1: out of luck" in printed
    assert "| layerwise | 1 |" in printed


def test_places_are_shared_evenly(script, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    assert script.find_places(None, 2) == ["cuda:0", "cuda:1"] * 2
    assert script.find_places(1, 1) == ["cuda:0"]
    assert script.find_places(0, 1) == ["cpu"]
    with pytest.raises(ValueError, match="--devices 3: this machine has 2 GPUs"):
        script.find_places(3, 1)


def test_runs_are_dealt_out_to_processes_that_take_several(script):
    assert script.deal(list("abc"), 2, 1) == [["a"], ["b"], ["c"]]
    assert script.deal(list("abcde"), 2, 16) == [["a", "c", "e"], ["b", "d"]]
    assert script.deal(list("a"), 2, 16) == [["a"]]
    assert script.deal([], 2, 16) == []
    defaults = {(is_text, device): script.find_runs_at_once(None, is_text, device) for is_text, device in CASES}
    assert defaults == {(False, "cpu"): 1, (False, "cuda:0"): 16, (True, "cpu"): 1, (True, "cuda:0"): 1}
    assert script.find_runs_at_once(3, False, "cpu") == 3
    with pytest.raises(ValueError, match="--runs_at_once 3: must be 1 in a study on documents"):
        script.find_runs_at_once(3, True, "cpu")


def test_a_process_on_a_gpu_has_a_queue_for_each_stream(script):
    command = script.worker([Path("a.json"), Path("b.json")], "cuda:1", runs_at_once=2)
    assert command[:3] == ["env", "CUDA_DEVICE_MAX_CONNECTIONS=32", sys.executable]
    assert command[-3:] == ["--run", "a.json", "b.json"]
    assert {"--device=cuda:1", "--runs_at_once=2"} < set(command)
    assert script.worker([Path("a.json")], "cpu")[0] == sys.executable


def test_a_process_takes_runs_in_turns_begins_others_when_they_end_and_tells_each(script, tmp_path, capsys):
    runs = short_run(), short_run(seed=1), short_run(task={"name": "dance"})
    *files, bad = (file.path for file in begun(tmp_path, *runs))
    assert script.main(["--runs_at_once=2", "--run", str(files[0]), str(bad), str(files[1])]) == 0
    told = [line.removeprefix("ended: ") for line in capsys.readouterr().out.splitlines()]
    assert told[0] == str(bad)
    assert sorted(told[1:]) == [str(file) for file in files]
    assert [json.loads(file.read_text())["stopped"] for file in files] == ["steps", "steps"]
    assert script.outcome(Ended(bad, 0)) == (
        True,
        "failed: ValueError: task 'dance': allowed are copy, recall, retrieval, babi",
    )


def test_when_the_time_is_over_runs_in_progress_are_tested_and_no_others_begun(script, tmp_path, capsys, monkeypatch):
    # Half of the time is reserved for the final tests, which need less, so another run would fit.
    monkeypatch.setattr(single_run, "SPARE", 1e9)
    monkeypatch.setattr(single_run, "MOST_SPARE", 1.0)
    runs = [dataclasses.replace(short, eval_every=5) for short in script.build_study("quick", Texts(), range(2))]
    files = [file.path for file in begun(tmp_path, *runs)]
    deadline = time.time() + 8.0
    flags = ["--runs_at_once=3", f"--deadline={deadline}", "--run", *map(str, files)]
    assert script.main(flags) == 0
    # The duration of tests beside other processes varies.
    assert time.time() < deadline + 10.0
    assert set(capsys.readouterr().out.split()) == {"ended:", *map(str, files[:3])}
    for file in files[:3]:
        record = json.loads(file.read_text())
        assert record["stopped"] == "budget"
        assert record["steps"] == record["curve"][-1]["step"] > 5
        assert set(record["accuracy"]) == {"1", "2", "4", "8", "16"}
    assert set(json.loads(files[3].read_text())) == {"run"}


def test_a_study_of_documents_trains_every_model_and_compares_them(documents, tmp_path):
    small = {"segment_size": 16, "max_n_segments": 4, "vocab_size": 320, "pre_seq_len": 3, "max_target_length": 8}
    small |= {"model_size": "tiny", "per_device_train_batch_size": 2, "eval_every": 1, "eval_documents": 2}
    small |= {"cache_dir": documents / "cache", "dataloader_num_workers": 0}
    flags = ["--dataset", documents, "--seeds", 1, "--max_steps", 2, "--only", "BART", "--processes_per_device", 2]
    changed = [f"{name}={value}" for name, value in small.items()]
    ended = run_script(SCRIPT, "sections", "--output_dir", tmp_path, *flags, "--set", *changed, timeout=240)
    assert ended.codes == [0], ended.text()
    output = ended.text()
    assert output.count("steps after 2 steps") == 2
    text = (tmp_path / "report.md").read_text()
    assert text in output
    assert "| BART, last segment of each section | 1 | 2 |" in text
    assert (tmp_path / "losses.png").stat().st_size > 1000
    records = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert all(record["run"]["seconds"] == 300 and record["texts"] for record in records)


def test_processes_of_one_device_are_told_how_many_they_are(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.torch, "set_num_threads", lambda number: None)
    told, commands = [], []
    monkeypatch.setattr(script, "share_device", told.append)

    def start(groups, places, command, deadline):
        commands.extend(command(files, "cpu") for files in groups)
        return iter(())

    monkeypatch.setattr(script, "run_side_by_side", start)
    assert script.main([*SHORT, "--output_dir", str(tmp_path), "--processes_per_device", "3"]) == 1
    # With no time left, the process does nothing.
    flags = commands[0][commands[0].index("study") + 1 :]
    assert script.main([*flags, "--deadline=0"]) == 0
    assert told == [3]


def test_documents_are_made_ready_before_runs_that_start_together(script, monkeypatch, started, tmp_path):
    prepared = []
    monkeypatch.setattr("recurrent_bart.studies.documents.training.prepare_documents", prepared.append)
    flags = ["document", "--seconds", "7", "--set", "model_size=base", "--output_dir", str(tmp_path)]
    assert script.main(flags) == 1
    assert [(run.seconds, run.flags["model_size"]) for run in prepared] == [(7.0, "base")]
    assert len(started[0]) == 3 * 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["quik"], "study quik: allowed are quick"),
        ([], "study None: allowed are quick"),
        (["babi"], "--facts and --filler"),
        (
            ["quick", "--only", "rmt", "led"],
            "--only 'rmt' 'led': no run of the study quick has this text in its name or its file name; the names are",
        ),
        (["quick", "--report_only", "--output_dir", "nowhere"], "nowhere: no run has finished"),
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


def test_a_worker_and_a_summary_load_nothing_that_they_do_not_need():
    """Load both commands in one new process: its imports take longer than the commands."""
    program = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name); print(*sys.modules)"
    names = [f"recurrent_bart.commands.{name}" for name in ("study", "summarize")]
    code, output = run([sys.executable, "-c", program, *names], timeout=60)
    assert code == 0, output
    of_worker, of_both = map(set, map(str.split, output.splitlines()))
    assert not {"deepspeed", "wandb", "datasets", "rich", "rouge_score"} & of_worker
    assert "recurrent_bart.inference.summarizer" in of_both
    assert not {"deepspeed", "wandb", "datasets", "pandas", "pyarrow", "rouge_score"} & of_both


def test_a_model_is_picked_by_its_name_in_the_tables():
    flags = ["documents-pretrained", "--only", "BART, full attention", "LED", "--seeds", "1"]
    arguments = build_parser().parse_args([*flags, "--set", "model_name_or_path=m"])
    assert {run.name for run in find_runs(arguments)} == {"LED", "BART, full attention"}
