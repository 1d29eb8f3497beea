"""A signal to any process ends the run between two steps, with a complete checkpoint and exit code 75."""

import signal

import pytest

from recurrent_bart.training.lifecycle.exit_codes import ExitCode

DONE, STOPPED = ExitCode.DONE, ExitCode.STOPPED
pytestmark = pytest.mark.distributed


def assert_stopped(run, ended, step, reason):
    assert set(ended.codes) == {STOPPED}, ended.text()
    assert f"stopped    after step {step}: {reason}" in ended.printed[0]
    assert f"continue with --resume {run.folder}" in ended.printed[0]
    # Only one process prints.
    assert not "".join(ended.printed[1:])
    assert run.outcome() == {"code": STOPPED, "reason": reason, "step": step}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_rank_stops_all_ranks_after_the_step(run, name, rank):
    ended = run.train(fault="signalled", ranks=[rank], moment="step", number=getattr(signal, name), at=3)
    assert_stopped(run, ended, 3, name)
    # The evaluation after the second step also saved a checkpoint.
    assert run.steps() == [2, 3]


def test_a_signal_to_every_rank_stops_the_run_once(run):
    ended = run.train(fault="signalled", ranks=[0, 1], moment="update", number=signal.SIGTERM, at=3)
    assert_stopped(run, ended, 3, "SIGTERM")
    assert run.steps() == [2, 3]
    # One process reports the signal immediately.
    assert ended.text().count("stopping   SIGTERM received") == 1
    assert ended.printed[0].index("stopping   SIGTERM") < ended.printed[0].index("stopped    after step 3")
    assert f"saved      {run.folder}/model, the model after step 2" in ended.printed[0]


def test_a_signal_during_generation_stops_before_the_last_text(run):
    changes = {"eval_documents": 5, "per_device_eval_batch_size": 1, "deepspeed": "ds_configs/zero3.json"}
    ended = run.train(fault="signalled", ranks=[0], moment="evaluation", number=signal.SIGUSR1, changes=changes)
    assert_stopped(run, ended, 2, "SIGUSR1")
    assert run.steps() == [2]
    assert sorted(run.evaluations()) == [0]
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()
    # The interrupted evaluation is repeated.
    assert sorted(run.evaluations()) == [0, 2, 4, 6]


def test_a_signal_during_a_checkpoint_leaves_the_checkpoint_undamaged(run):
    ended = run.train(fault="signalled", moment="save", number=signal.SIGTERM)
    assert_stopped(run, ended, 2, "SIGTERM")
    assert run.steps() == [2]


def test_a_second_signal_does_not_damage_the_checkpoint_of_the_first(run):
    ended = run.train(fault="signalled_then_while_saving", number=signal.SIGTERM)
    assert_stopped(run, ended, 3, "SIGTERM")
    assert run.steps() == [2, 3]


def test_ten_signals_at_once_act_as_one(run):
    ended = run.train(1, fault="signalled", ranks=[0], moment="step", number=signal.SIGINT, at=1, n_times=10)
    assert_stopped(run, ended, 1, "SIGINT")
    assert run.steps() == [1]


def test_data_loader_processes_ignore_signals(run):
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    changes = {"dataloader_num_workers": 2}
    ended = run.train(1, fault="workers_signalled", ranks=[0], numbers=numbers, changes=changes)
    assert ended.codes == [DONE], ended.text()
    assert sorted(run.losses()) == [1, 2, 3, 4, 5, 6]


def test_a_signal_before_training_begins_ends_the_process_at_once(run):
    ended = run.train(1, fault="signalled_before_training", ranks=[0])
    assert ended.codes == [STOPPED], ended.text()
    assert "stopped    before training began: SIGTERM" in ended.text()
    assert not run.folder.exists()


def test_a_stop_file_stops_a_run_and_not_the_resumed_run(run):
    path = run.folder / "stop"
    ended = run.train(fault="stop_file_appears", ranks=[1], path=path, at=3)
    assert_stopped(run, ended, 3, "the stop file")
    assert run.steps() == [2, 3]
    assert path.exists()
    ended = run.resume()
    assert ended.codes == [DONE, DONE], ended.text()
    assert not path.exists()
    assert run.outcome() == {"code": DONE, "reason": "", "step": 6}


def test_a_run_stops_after_max_minutes(run):
    # Minutes count from the start of the process, which takes longer than this.
    ended = run.train(changes={"max_minutes": 0.001})
    assert_stopped(run, ended, 0, "--max_minutes")
    # A checkpoint at step 0 would contain nothing new.
    assert run.steps() == []
    ended = run.resume(changes={"max_minutes": 5})
    assert ended.codes == [DONE, DONE], ended.text()


def test_a_stopped_and_resumed_run_gives_the_losses_of_an_uninterrupted_run(run, documents, tmp_path_factory):
    whole = type(run)(documents, tmp_path_factory.mktemp("whole"))
    changes = {"dropout": 0.1, "dataloader_num_workers": 1}
    assert whole.train(1, changes=changes).codes == [DONE]
    ended = run.train(1, "signalled", changes, ranks=[0], moment="step", number=signal.SIGTERM, at=3)
    assert ended.codes == [STOPPED], ended.text()
    assert run.resume(1).codes == [DONE]
    assert len(whole.losses()) == 6
    assert run.losses() == whole.losses()
    assert run.evaluations() == whole.evaluations()
