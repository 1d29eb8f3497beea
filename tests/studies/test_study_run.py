"""Definition and file of a run, written and read."""

import json
from dataclasses import asdict

import pytest

from recurrent_bart.studies.study_run import RunFile, StudyRun
from recurrent_bart.studies.tasks.memory_tasks import Recall
from study_runs import short_run


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = short_run(seed=3)
    assert StudyRun.from_json(json.loads(json.dumps(asdict(run)))) == run
    with pytest.raises(ValueError, match="no field lr"):
        StudyRun.from_json({"name": "x", "task": {}, "lr": 1})


def test_runs_that_differ_have_files_of_their_own():
    names = {
        run.file_name()
        for run in (short_run(), short_run(seed=1), short_run(name="top (RMT)"), short_run(task={"name": "copy"}))
    }
    assert len(names) == 4
    assert short_run(name="top (RMT)").file_name() == "copy-n_payload=1-n_symbols=4-n_fillers=2-top-RMT--seed0.json"


def test_a_task_is_called_by_its_name_and_what_is_set_of_it():
    assert short_run(task={"name": "copy"}).task_name() == "copy"
    assert short_run(task={"name": "retrieval", "n_pairs": 2}).task_name() == "retrieval n_pairs=2"
    assert short_run(task={"name": "babi", "task": "qa1", "facts": "a", "filler": "b"}).task_name() == "qa1"


def test_tasks_are_built_with_their_fields():
    train, test = short_run(task={"name": "recall", "n_marked": 2}).build_tasks()
    assert train == test == Recall(n_marked=2)
    with pytest.raises(ValueError, match="task 'recal': allowed are copy"):
        short_run(task={"name": "recal"}).build_tasks()


def test_stages_of_one_run_of_babi_are_of_several_tasks_with_words_in_common(tmp_path):
    record = {"document": "Ann got milk.\nAnn went home.", "query": "Where is milk?", "summary": "home"}
    for split in ("train", "validation"):
        records = [record | {"task": task, "supporting_lines": [0, 1]} for task in ("qa1", "qa2")]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    texts = {"facts": str(tmp_path), "filler": str(tmp_path)}
    task = {"name": "babi", "task": "qa2", "with_subjects": True, "renamed": [["ann", "bob"]], **texts}
    run = StudyRun.from_json(json.loads(json.dumps(asdict(short_run(task=task)))))
    (first, _), (second, _) = run.build_tasks(task="qa1", with_subjects=False), run.build_tasks()
    assert first.vocabulary.ids == second.vocabulary.ids
    assert (first.target_length(1), second.target_length(1)) == (1, 2)


def test_a_window_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="window='first'"):
        short_run(window="first")


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: unreadable"):
        RunFile(tmp_path / "run.json").read()


def test_what_there_is_of_a_run_stays_until_there_is_more_but_not_another_runs(tmp_path):
    file = RunFile(tmp_path / "run.json")
    file.begin(short_run())
    file.write(file.read() | {"stopped": "budget"})
    file.begin(short_run())
    assert file.read()["stopped"] == "budget"
    file.begin(short_run(max_steps=7))
    assert file.read() == {"run": {**file.read()["run"], "max_steps": 7}}


def test_a_run_that_failed_says_why_beside_what_there_is_of_it(tmp_path):
    file = RunFile(tmp_path / "run.json")
    file.begin(short_run())
    file.write(file.read() | {"curve": [1]})
    file.fail("out of memory")
    assert (file.read()["error"], file.read()["curve"]) == ("out of memory", [1])
    assert not file.is_finished(short_run())
