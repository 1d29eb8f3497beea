"""Non-finite numbers, loss spikes and exhausted memory."""

import math

import pytest

from recurrent_bart.training.lifecycle.exit_codes import ExitCode

DONE, FAULT, MISTAKE = ExitCode.DONE, ExitCode.FAULT, ExitCode.MISTAKE
pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_skip_a_step_if_the_loss_of_one_rank_is_not_finite(run, value, stage):
    changes = {"deepspeed": f"ds_configs/zero{stage}.json"}
    ended = run.train(fault="loss_becomes", value=value, steps=[3], changes=changes)
    assert ended.codes == [DONE, DONE], ended.text()
    assert "warning: step 3 is skipped: the loss was not finite on rank 1" in ended.printed[0]
    assert sorted(run.losses()) == [1, 2, 4, 5, 6]
    assert run.steps() == [4, 6]


def test_all_ranks_skip_a_step_if_the_gradient_of_one_rank_is_not_finite(run):
    ended = run.train(fault="gradient_becomes", value=math.nan, step=3)
    assert ended.codes == [DONE, DONE], ended.text()
    assert "warning: step 3 is skipped: the gradient was not finite, but every loss was" in ended.printed[0]


def test_many_skipped_steps_end_the_run_with_a_checkpoint_to_resume(run):
    changes = {"max_skipped_steps": 2, "eval_every": 100}
    ended = run.train(fault="loss_becomes", value=math.nan, steps=[2, 3], changes=changes)
    assert ended.codes == [MISTAKE, MISTAKE], ended.text()
    assert "error: step 3: no finite gradient in 2 steps" in ended.printed[0]
    assert not ended.printed[1]
    assert run.steps() == [3]
    ended = run.resume(fault="loss_becomes", value=math.nan, steps=[1])
    assert ended.codes == [DONE, DONE], ended.text()
    assert sorted(run.losses()) == [1, 5, 6]


def test_a_loss_far_above_the_median_is_reported(run):
    changes = {"max_steps": 11, "eval_every": 20, "max_grad_norm": 0.1}
    ended = run.train(1, fault="loss_becomes", ranks=[0], value=5.0, steps=[10], changes=changes)
    assert ended.codes == [DONE], ended.text()
    assert ended.text().count("warning: step 10: the loss is ") == 1
    assert "warning: step 11" not in ended.text()


def test_too_many_high_losses_in_a_row_end_the_run(run):
    changes = {"max_steps": 14, "eval_every": 8, "max_loss_spikes": 2}
    ended = run.train(fault="loss_becomes", ranks=[0, 1], value=5.0, steps=range(10, 15), changes=changes)
    assert ended.codes == [MISTAKE, MISTAKE], ended.text()
    assert "error: step 11: the loss is " in ended.printed[0]
    # No checkpoint has weights from steps with a high loss.
    assert run.steps() == [8]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_memory_in_a_forward_pass_names_the_batch_size(run, accumulation):
    changes = {"gradient_accumulation_steps": accumulation}
    ended = run.train(fault="out_of_memory", moment="step", at=2 * accumulation + accumulation, changes=changes)
    assert ended.codes == [FAULT, FAULT], ended.text()
    message = "fault on rank 1: step 3: out of memory on rank 1 with 2 documents of "
    assert message in ended.printed[1]
    for advice in ("segments of 16 tokens", "--per_device_train_batch_size", "--gradient_checkpointing segment"):
        assert advice in ended.printed[1]
    assert "Traceback" not in ended.text()
    assert run.steps() == [2]


@pytest.mark.parametrize("stage", [2, 3])
def test_out_of_memory_in_a_backward_pass_ends_the_other_rank(run, stage):
    changes = {"gradient_accumulation_steps": 3, "deepspeed": f"ds_configs/zero{stage}.json"}
    ended = run.train(fault="out_of_memory_backward", at=8, changes=changes, timeout=60)
    assert ended.codes == [FAULT, FAULT], ended.text()
    assert "fault on rank 1: step 3: out of memory on rank 1" in ended.printed[1]
    assert "fault on rank 0: another process has ended" in ended.printed[0]
    assert run.steps() == [2]
