"""Data of a run that the report shows: the newest evaluation, the lowest loss, and flags that differ."""

from recurrent_bart.report.run_record import (
    different_validation,
    differing_flags,
    facts,
    hosts,
    key_metrics,
    read_run,
    slowest,
)
from recurrent_bart.run_folder import RunFolder
from reported_runs import DEFAULTS, evaluation_record, sample, step_record, write_run


def texts_of(run):
    return {name: text["generated"] for name, text in run.samples.items()}


def test_samples_are_those_of_the_last_evaluation_alone(tmp_path):
    path = write_run(tmp_path / "run", [step_record(20)], [sample("a", "x", "y", "old"), sample("b", "x", "y", "old")])
    assert texts_of(read_run(path, DEFAULTS)) == {"a": "old", "b": "old"}
    # the document `b` is no longer among the samples
    RunFolder(path).append_samples("Step 40", [sample("a", "x", "y", "new")])
    assert texts_of(read_run(path, DEFAULTS)) == {"a": "new"}


def test_the_best_evaluation_has_the_lowest_loss_and_its_own_rouge(tmp_path):
    losses = {10: 3.5, 20: 3.25, 30: 3.75}
    records = [evaluation_record(step, validation_loss=loss, rouge1=float(step)) for step, loss in losses.items()]
    run = read_run(write_run(tmp_path / "run", records), DEFAULTS)
    assert run.best["step"] == 20
    found = key_metrics(run)
    assert (found["best validation loss"], found["ROUGE-1"]) == ("3.2500", "20.00")
    assert run.points("validation_loss") == [(10, 3.5), (20, 3.25), (30, 3.75)]
    assert run.last("validation_loss") == 3.75


def test_the_best_evaluation_is_the_one_whose_model_the_run_saved(tmp_path):
    losses = {10: 3.5, 20: 3.25, 30: 3.75}
    records = [evaluation_record(step, validation_loss=loss, rouge1=float(step)) for step, loss in losses.items()]
    run = read_run(write_run(tmp_path / "run", records, metric_for_best_model="rouge1"), DEFAULTS)
    found = key_metrics(run)
    assert (found["best validation loss"], found["ROUGE-1"]) == ("3.2500", "30.00")
    assert facts(run)["best evaluation"] == "after step 30, chosen by rouge1"


def test_resumes_are_told_with_the_flags_that_changed(tmp_path):
    assert "resumed" not in facts(read_run(write_run(tmp_path / "first", [step_record(1)]), DEFAULTS))
    resumes = [{"step": 2000, "changes": {"max_steps": [6, 8], "patience": [0, 3]}}, {"step": 3000, "changes": {}}]
    run = read_run(write_run(tmp_path / "run", [step_record(1)], sections={"resumes": resumes}), DEFAULTS)
    changes = "--max_steps 8 (before: 6), --patience 3 (before: 0)"
    assert facts(run)["resumed"] == f"after step 2,000 with {changes}; after step 3,000"


def test_runs_on_different_validation_documents_are_told(tmp_path):
    def run(name, **changes):
        return read_run(write_run(tmp_path / name, [step_record(1)], **changes), DEFAULTS)

    def of(fingerprint):
        return {"documents": {"validation": {"number": 5, "fingerprint": fingerprint}}}

    assert different_validation([run("a", sections=of("x")), run("b", sections=of("x"), dataset="moved")]) == ""
    warning = different_validation([run("c", sections=of("x")), run("d", sections=of("y"), dataset="stories")])
    assert warning.startswith("The runs have different validation documents, so losses and ROUGE are not comparable.")
    assert warning.endswith(" c: papers, one target per document; d: stories, one target per document.")
    # runs of older versions do not record their documents
    assert different_validation([run("e"), run("f")]) == ""
    assert different_validation([run("g"), run("h", dataset="stories")])
    assert different_validation([run("i"), run("j", task="sections")])


def test_the_slowest_rank_is_the_one_that_was_it_most_often(tmp_path):
    ranks = [(0, "alpha"), (1, "beta"), (1, "beta"), (2, "beta")]
    records = [
        step_record(step, slowest_rank=rank, slowest_host=host, fastest_host="gamma", rank_seconds=[1.0] * 3)
        for step, (rank, host) in enumerate(ranks, 1)
    ]
    run = read_run(write_run(tmp_path / "run", records), DEFAULTS)
    assert slowest(run) == "slowest most often: rank 1 on beta, in 50 % of the log lines"
    assert hosts(run) == {"alpha", "beta", "gamma"}


def test_flags_that_differ_are_listed_with_the_value_of_each_run(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, [step_record(1)], seed=seed, output_dir=name), DEFAULTS)
        for name, seed in (("a", 1), ("b", 2))
    ]
    assert differing_flags(runs) == [("seed", ["1", "2"])]


def test_the_command_has_the_flags_that_differ_from_defaults_without_those_of_one_start(tmp_path):
    path = write_run(tmp_path / "run", [], seed=3, resume="elsewhere", local_rank=1)
    assert read_run(path, DEFAULTS | {"learning_rate": 0.5}).command() == (
        "launch/train.py --segment_size 64 --dataset papers --max_steps 40 --output_dir somewhere --seed 3"
    )
