"""Whole run: early stopping, best model, skipped steps, and several runs in one process."""

import functools
import json
import math
import shutil
import subprocess
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from launching import load_script
from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.monitoring.progress import ProgressDisplay
from recurrent_bart.training.lifecycle.exit_codes import ExitCode
from recurrent_bart.training.lifecycle.run_lock import Holder, RunLock
from recurrent_bart.training.session import Session
from recurrent_bart.training.trainer import Trainer
from recurrent_bart.training.zero.engine import full_state_dict
from runs import flags


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some steps, counted from 1, not finite."""

    def spoil_steps(steps):
        train_step = Trainer.train_step

        def spoilt_step(trainer):
            def hook(module, args, output):
                output.loss = output.loss * math.nan
                return output

            if trainer.state.step + 1 not in steps:
                return train_step(trainer)
            handle = trainer.engine.module.register_forward_hook(hook)
            try:
                return train_step(trainer)
            finally:
                handle.remove()

        monkeypatch.setattr(Trainer, "train_step", spoilt_step)

    return spoil_steps


@pytest.mark.slow
def test_it_stops_when_the_loss_rises_and_keeps_the_best_model(documents, tmp_path, train_main, monkeypatch, capsys):
    weights = {}
    evaluate = Session.evaluate

    def evaluate_and_keep(session):
        weights[session.state.step] = full_state_dict(session.engine)
        assert {group["betas"] for group in session.engine.optimizer.param_groups} == {(0.9, 0.8)}
        return evaluate(session)

    monkeypatch.setattr(Session, "evaluate", evaluate_and_keep)
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.0])
    monkeypatch.setattr("recurrent_bart.evaluation.evaluator.Evaluator.loss", lambda *_: next(losses))
    arguments = flags(documents, tmp_path / "run", eval_every=1, max_steps=9, patience=3, adam_beta2=0.8)
    assert train_main(arguments) == 0
    evaluations = [record for record in read_metrics(tmp_path / "run") if "validation_loss" in record]
    assert [record["validation_loss"] for record in evaluations] == [5.0, 4.0, 3.0, 3.5, 3.2, 3.1]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert saved
    assert all(saved[name].equal(weights[2][name]) for name in saved)
    assert not all(saved[name].equal(weights[5][name]) for name in saved)
    # the last two checkpoints, and the one with the lowest loss
    lines = capsys.readouterr().out.splitlines()
    assert f"saved      {tmp_path}/run/model, the model after step 2: validation loss 3.0000, the lowest" in lines
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004", "step-00000005"]


@pytest.fixture
def set_metrics(monkeypatch):
    """Return a function that sets the loss and ROUGE-2 of each evaluation; the first evaluation has no ROUGE."""

    def set_metrics(losses, rouge2):
        scores = ({"rouge2": Interval(value, None, None)} for value in rouge2)
        own_losses = iter(losses)
        monkeypatch.setattr("recurrent_bart.evaluation.evaluator.Evaluator.loss", lambda *_: next(own_losses))
        module = "recurrent_bart.training.session"
        monkeypatch.setattr(f"{module}.mean_scores", lambda predictions: next(scores) if predictions else {})

    return set_metrics


@pytest.mark.slow
def test_the_best_model_can_be_chosen_by_rouge(documents, tmp_path, train_main, set_metrics, capsys):
    set_metrics([5.0, 4.0, 3.0, 2.0, 1.0], [10.0, 30.0, 20.0, 30.0])
    arguments = flags(
        documents, tmp_path / "run", eval_every=1, max_steps=9, metric_for_best_model="rouge2", patience=2
    )
    assert train_main(arguments) == 0
    line = f"saved      {tmp_path}/run/model, the model after step 2: rouge2 30.00, the highest"
    assert line in capsys.readouterr().out.splitlines()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "trainer.json").read_text())["state"]
    assert (state["best_value"], state["best_metric"], state["best_step"]) == (30.0, "rouge2", 2)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_metric_or_compares_with_the_saved_model(
    documents, tmp_path, train_main, set_metrics, capsys
):
    run = str(tmp_path / "run")
    set_metrics([5.0, 4.0, 3.0], [40.0, 20.0])
    assert train_main(flags(documents, tmp_path / "run", eval_every=1, max_steps=2)) == 0
    # ROUGE-2 of the saved model, the one of step 2, is 20
    set_metrics([9.0, 8.0], [15.0, 25.0])
    capsys.readouterr()
    assert train_main(["--resume", run, "--max_steps", "3", "--metric_for_best_model", "rouge2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "best       RUN/model is replaced when an evaluation has a better rouge2 than the saved model" in lines
    assert f"saved      {run}/model, the model after step 2: rouge2 20.00, the highest" in lines
    assert train_main(["--resume", run, "--max_steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"saved      {run}/model, the model after step 4: rouge2 25.00, the highest" in lines


@pytest.mark.slow
def test_a_run_resumed_with_another_metric_before_a_model_is_saved_saves_the_next_one(
    documents, tmp_path, train_main, set_metrics, monkeypatch, capsys
):
    run, finish_step = tmp_path / "run", Session.step

    def finish_step_and_stop(session, step):
        (run / "stop").touch()
        finish_step(session, step)

    # the evaluation before the first step has a loss, but no ROUGE and therefore no model
    set_metrics([5.0], [])
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", finish_step_and_stop)
        arguments = flags(documents, run, max_steps=4, metric_for_best_model="rouge2")
        assert train_main(arguments) == ExitCode.STOPPED
    assert not (run / "model").exists()
    # these losses are higher than the loss of the evaluation without a saved model
    set_metrics([9.0, 8.0], [1.0, 1.0])
    capsys.readouterr()
    assert train_main(["--resume", str(run), "--metric_for_best_model", "loss"]) == 0
    line = f"saved      {run}/model, the model after step 4: validation loss 8.0000, the lowest"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_skipped_step_is_logged_and_said(documents, tmp_path, train_main, capsys, spoil):
    spoil({3})
    assert train_main(flags(documents, tmp_path / "run", max_steps=4)) == 0
    records = read_metrics(tmp_path / "run")
    reason = "step 3 is skipped: the loss was not finite on rank 0"
    assert [record for record in records if "skipped" in record] == [{"step": 3, "skipped": reason}]
    assert f"warning: {reason}" in capsys.readouterr().out
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 4]
    # each line is standard JSON, without NaN
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.slow
def test_many_skipped_steps_end_the_command_in_one_line(documents, tmp_path, train_main, capsys, spoil):
    spoil(range(1, 99))
    assert train_main(flags(documents, tmp_path / "run", max_steps=50, eval_every=50)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 10: no finite gradient in 10 steps")


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(documents, tmp_path, train_main, monkeypatch):
    arguments = flags(documents, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_main(arguments)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0]
    assert train_main(["--resume", str(tmp_path / "run")]) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "validation_loss" in record] == [0, 2, 4, 6]


@pytest.mark.slow
def test_a_run_that_is_done_can_be_made_longer(documents, tmp_path, train_main):
    assert train_main(flags(documents, tmp_path / "run", max_steps=2)) == 0
    assert train_main(["--resume", str(tmp_path / "run"), "--max_steps", "4"]) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert records[-1]["step"] == 4


def test_a_run_whose_model_was_not_written_does_not_say_that_it_was(
    documents, tmp_path, train_main, monkeypatch, capsys
):
    monkeypatch.setattr(Session, "_export", lambda session: (_ for _ in ()).throw(OSError("no space left")))
    assert train_main(flags(documents, tmp_path / "run", max_steps=2)) == 1
    assert "saved " not in capsys.readouterr().out


@pytest.mark.slow
def test_the_configuration_has_the_values_that_follow_from_other_flags(documents, tmp_path, train_main):
    run = tmp_path / "run"
    given = {"max_steps": 2, "learning_rate": 0.25, "curriculum": "1,2", "lora_r": 2}
    assert train_main(flags(documents, run, **given)) == 0
    expected = {"learning_rate": 0.25, "recurrence_learning_rate": 0.25, "per_device_eval_batch_size": 2}
    expected |= {"curriculum_steps": 1, "lora_alpha": 4}
    # two steps of two documents, of 24
    expected |= {"max_steps": 2, "num_train_epochs": 0.1667, "warmup_steps": 2, "eval_every": 2}
    assert json.loads((run / "config.json").read_text())["resolved"] == expected
    # the default for a new model with d_model 128; derived defaults are derived again on resume
    assert train_main(flags(documents, tmp_path / "second", max_steps=2)) == 0
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["resolved"]["learning_rate"] == config["resolved"]["recurrence_learning_rate"] == 3e-3
    assert config["arguments"]["run"]["learning_rate"] is None
    assert train_main(["--resume", str(tmp_path / "second"), "--learning_rate", "0.5", "--max_steps", "3"]) == 0
    resolved = json.loads((tmp_path / "second" / "config.json").read_text())["resolved"]
    assert resolved["recurrence_learning_rate"] == 0.5


@pytest.fixture(scope="module")
def begun(documents, tmp_path_factory):
    """Return a function from a ZeRO stage to the folder of a run of two steps, which tests copy."""

    @functools.cache
    def begin(stage):
        folder = tmp_path_factory.mktemp("begun") / "run"
        changes = {"max_steps": 2, "eval_documents": 1, "weight_decay": 0.1}
        argv = flags(documents, folder, deepspeed=f"ds_configs/zero{stage}.json", **changes)
        assert load_script("train").main(argv) == 0
        return folder

    return begin


@pytest.fixture
def finished(begun, tmp_path):
    """Return the folder of a run of two steps."""
    return shutil.copytree(begun(2), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--recurrence", "top"], "--recurrence top: the run was started with layerwise"),
        (["--dataset", "elsewhere"], "--dataset elsewhere: the run was started with stdlib"),
        (["--max_steps", "1"], "--max_steps 1: must be at least 2, the steps that the run has done"),
        (["--tokens_per_batch", "80"], "--tokens_per_batch 80: the run was started without this flag"),
    ],
    ids=lambda item: item[0] if isinstance(item, list) else "",
)
def test_a_flag_that_is_refused_leaves_a_finished_run_as_it_was(finished, train_main, capsys, changes, message):
    before = contents(finished)
    assert train_main(["--resume", str(finished), *changes]) == 2
    assert message in capsys.readouterr().err
    assert contents(finished) == before
    assert json.loads((finished / "outcome.json").read_text())["code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[], ["--learning_rate", "0.5"], ["--max_steps", "2", "--seed", "1"]], ids=str)
def test_a_finished_run_that_is_resumed_stays_as_it_was(finished, train_main, capsys, changes):
    before = contents(finished)
    capsys.readouterr()
    assert train_main(["--resume", str(finished), *changes]) == 0
    printed = capsys.readouterr().out
    assert "finished   all 2 steps are done; give a larger --max_steps or --num_train_epochs to go on" in printed
    assert contents(finished) == before


@pytest.mark.slow
def test_a_run_that_ended_by_patience_goes_on_only_with_another_patience(documents, tmp_path, train_main, set_metrics):
    run = tmp_path / "run"
    set_metrics([1.0] * 9, [1.0] * 9)
    assert train_main(flags(documents, run, eval_every=1, max_steps=4, patience=2)) == 0
    before = contents(run)
    assert train_main(["--resume", str(run)]) == 0
    assert contents(run) == before
    # the same if the process was killed before its end was recorded
    (run / "outcome.json").unlink()
    assert train_main(["--resume", str(run)]) == 0
    assert read_metrics(run)[-1]["step"] == 2
    assert json.loads((run / "outcome.json").read_text())["code"] == 0
    assert train_main(["--resume", str(run), "--patience", "0"]) == 0
    assert read_metrics(run)[-1]["step"] == 4
    config = json.loads((run / "config.json").read_text())
    assert config["resumes"][-1] == {"step": 2, "changes": {"patience": [2, 0]}}


@pytest.mark.slow
def test_a_finished_run_whose_end_was_not_recorded_is_ended_again(finished, train_main):
    (finished / "outcome.json").unlink()
    assert train_main(["--resume", str(finished)]) == 0
    assert json.loads((finished / "outcome.json").read_text())["code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "changes", [{"weight_decay": 0}, {"recurrence_learning_rate": 0.5}, {"learning_rate": 0.25}, {"adam_beta2": 0.5}]
)
def test_settings_of_the_optimizer_that_are_given_on_resuming_hold(
    begun, tmp_path, train_main, monkeypatch, stage, changes
):
    folder, groups = shutil.copytree(begun(stage), tmp_path / "run"), []

    def look(session):
        names = ("weight_decay", "initial_lr", "betas")
        groups.extend({name: group[name] for name in names} for group in session.engine.optimizer.param_groups)

    monkeypatch.setattr(Session, "train", look)
    given = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    assert train_main(["--resume", str(folder), "--max_steps", "4", *given]) == 0
    decays, rates = ({group[name] for group in groups} for name in ("weight_decay", "initial_lr"))
    assert decays == ({0.0} if "weight_decay" in changes else {0.0, 0.1})
    own = changes.get("recurrence_learning_rate", changes.get("learning_rate"))
    assert own is None or own in rates
    assert {group["betas"][1] for group in groups} == {changes.get("adam_beta2", 0.999)}


@pytest.mark.slow
def test_another_seed_draws_other_numbers_from_there_on(finished, train_main, monkeypatch):
    drawn = []
    monkeypatch.setattr(Session, "train", lambda session: drawn.append(torch.rand(()).item()))
    for seed in (42, 42, 43, 44):
        assert train_main(["--resume", str(finished), "--max_steps", "4", "--seed", str(seed)]) == 0
        # restore the saved seed, which the resumed run has changed
        (finished / "config.json").write_text(
            (finished / "config.json").read_text().replace(f'"seed": {seed}', '"seed": 42')
        )
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.slow
def test_flags_that_hold_from_here_on_are_told(finished, train_main, capsys):
    capsys.readouterr()
    assert train_main(["--resume", str(finished), "--max_steps", "3", "--weight_decay", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "--max_steps 3 (before: 2)" in printed
    assert "--weight_decay 0.5 (before: 0.1)" in printed


@pytest.mark.slow
def test_the_bar_moves_with_every_step(documents, tmp_path, train_main, monkeypatch):
    steps = []
    monkeypatch.setattr(ProgressDisplay, "step", lambda display, step: steps.append(step))
    assert train_main(flags(documents, tmp_path / "run", max_steps=3, log_every=3)) == 0
    assert steps == [1, 2, 3]


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def hold_lock(tmp_path):
    """Yield a function that lets another process hold the lock of the run folder."""
    other = subprocess.Popen(["sleep", "100"])
    (tmp_path / "run").mkdir(exist_ok=True)
    lock = RunLock(tmp_path / "run", Holder.here("", 0))
    lock.holder = replace(lock.holder, pid=other.pid, started=psutil.Process(other.pid).create_time())
    yield lock.acquire
    lock.release()
    other.kill()
    other.wait()


def contents(folder):
    """Return the content of each file of a folder, by name."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_is_refused_where_one_goes_on_and_changes_nothing(documents, tmp_path, train_main, capsys, hold_lock):
    arguments = flags(documents, tmp_path / "run", max_steps=2)
    assert train_main(arguments) == 0
    assert not (tmp_path / "run" / "lock").exists()
    hold_lock()
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert train_main(["--resume", str(tmp_path / "run"), "--max_steps", "4"]) == 2
    assert "another run uses this folder (process" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


def test_a_new_run_is_refused_where_one_begins(documents, tmp_path, train_main, capsys, hold_lock):
    hold_lock()
    assert train_main(flags(documents, tmp_path / "run")) == 2
    assert "another run uses this folder (process" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_whose_folder_was_taken_over_ends_and_writes_nothing_more(documents, tmp_path, train_main, capsys):
    def take_over(session, step):
        (tmp_path / "run" / "lock").write_text("{}")
        session.lock.renew()
        session.lock.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", take_over)
        assert train_main(flags(documents, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "another run has taken over this folder" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "outcome.json").exists()
    assert (tmp_path / "run" / "lock").exists()
