"""Checkpoints: which one is read, which are kept, and what is refused."""

from dataclasses import replace

import pytest
import torch

from recurrent_bart.training import checkpoints as module
from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.checkpoints import Checkpoints, TrainerState
from recurrent_bart.training.engine import build_engine, full_state_dict
from recurrent_bart.training.optimization import LearningRates, build_optimizer, build_scheduler
from tiny import random_ids, tiny_model

STATE = TrainerState(step=2, best_loss=1.5, best_step=1, n_worse=1, n_skipped=3, n_skipped_in_row=2)


def make_engine(stage=2, clip=1.0, decay=0.1, rate=0.5, **changes):
    run = RunArguments(max_steps=10, warmup_steps=2)
    model = tiny_model(**changes).train()
    optimizer = build_optimizer(model, LearningRates(rate, 2 * rate), decay)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
    }
    return build_engine(model, optimizer, build_scheduler(optimizer, run), config)


def train(engine, n_steps=2):
    for _ in range(n_steps):
        engine.backward(engine(random_ids(2, 3, 8), labels=random_ids(2, 4)).loss)
        engine.step()
    return engine


@pytest.fixture
def saved(alone, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    engine = train(make_engine())
    checkpoints.save(engine, STATE)
    return checkpoints, engine


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.mark.parametrize("stage", [2, 3])
def test_all_of_a_state_comes_back(alone, tmp_path, stage):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE)
    drawn = torch.rand(3)
    other = make_engine(stage)
    assert checkpoints.load(other) == STATE
    assert torch.equal(torch.rand(3), drawn)
    found, expected = full_state_dict(other), full_state_dict(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert other.get_lr() == engine.get_lr()


def test_without_a_checkpoint_a_run_begins_anew(alone, tmp_path):
    assert Checkpoints(tmp_path / "none", keep_last=2).load(make_engine()) == TrainerState()


def test_the_last_and_the_best_are_kept(saved):
    checkpoints, engine = saved
    for step in range(3, 7):
        checkpoints.save(engine, replace(STATE, step=step, best_step=3))
    assert names(checkpoints) == ["step-00000003", "step-00000005", "step-00000006"]


def test_one_that_is_half_written_is_not_read(saved, monkeypatch):
    checkpoints, engine = saved

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(engine, replace(STATE, step=3))
    assert names(checkpoints) == [".step-00000003.tmp", "step-00000002"]
    assert checkpoints.load(make_engine()).step == 2
    # the next one takes its place
    checkpoints.save(engine, replace(STATE, step=4))
    assert names(checkpoints) == ["step-00000002", "step-00000004"]


def test_one_that_is_half_removed_is_not_read(saved, monkeypatch):
    checkpoints, engine = saved
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **_: None)
    for step in (3, 4):
        checkpoints.save(engine, replace(STATE, step=step))
    assert "step-00000002" not in names(checkpoints)


@pytest.mark.parametrize("pattern", ["engine/*model_states.pt", "engine/*optim_states.pt", "rng-0.pt"])
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "cut off"])
def test_a_checkpoint_without_a_whole_file_is_refused(saved, pattern, is_gone):
    checkpoints, _ = saved
    (file,) = (checkpoints.folder / "step-00000002").glob(pattern)
    content = file.read_bytes()
    file.unlink()
    if not is_gone:
        file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"step-00000002: .*{file.name} is incomplete"):
        checkpoints.load(make_engine())


def test_a_checkpoint_whose_record_is_cut_off_is_refused(saved):
    checkpoints, _ = saved
    (checkpoints.folder / "step-00000002" / "trainer.json").write_text('{"state": {')
    with pytest.raises(ValueError, match="step-00000002: unreadable"):
        checkpoints.load(make_engine())


@pytest.mark.parametrize(
    ("what", "changes"), [("ZeRO stage: 2 then, 3 now", {"stage": 3}), ("model: ", {"pre_seq_len": 4})]
)
def test_another_engine_is_refused(saved, what, changes):
    with pytest.raises(ValueError, match=what):
        saved[0].load(make_engine(**changes))


def test_a_model_with_other_parameters_frozen_is_refused(saved):
    engine = make_engine()
    engine.module.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="model: "):
        saved[0].load(engine)


def test_another_number_of_processes_is_refused(saved):
    engine = make_engine()
    engine.world_size = 2
    with pytest.raises(ValueError, match="processes: 1 then, 2 now"):
        saved[0].load(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_settings_that_are_given_anew_hold(alone, tmp_path, stage):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE)
    other = make_engine(stage, clip=0.25, decay=0.7, rate=5.0)
    checkpoints.load(other)
    assert other.optimizer.clip_grad == 0.25
    assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.0, 0.7}
    assert other.get_lr() == pytest.approx([10 * rate for rate in engine.get_lr()])
    train(engine, 1)
    train(other, 1)
    assert other.get_lr() == pytest.approx([10 * rate for rate in engine.get_lr()])
