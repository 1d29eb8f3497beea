"""Checkpoints: which one is loaded, which are kept, and what is refused."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recurrent_bart.checkpointing import checkpoint_files, manifest
from recurrent_bart.checkpointing import checkpoints as module
from recurrent_bart.checkpointing.checkpoint_files import read_tensors
from recurrent_bart.checkpointing.checkpoints import CheckpointError, Checkpoints, Resumed, TrainerState
from recurrent_bart.training.optimization import LearningRates, build_optimizer, build_scheduler
from recurrent_bart.training.run_arguments import RunArguments
from recurrent_bart.training.zero.engine import build_engine, full_state_dict
from tiny import BUCKET, random_ids, tiny_model

STATE = TrainerState(
    step=2, best_value=1.5, best_step=1, n_worse=1, n_skipped=3, n_skipped_in_row=2, n_documents=8, order_batch=4
)
# a loss that is not a round number in float32, and counters
FIGURES = {"loss": 1.1000000238418579, "n_targets": 7, "n_tokens": 90, "n_steps": 2, "seconds": 3.5}


def make_engine(stage=2, clip=1.0, decay=0.1, rate=0.5, beta2=0.999, recurrence_rate=None, in_bf16=False, **changes):
    run = RunArguments(max_steps=10, warmup_steps=2)
    model = tiny_model(**changes).train()
    optimizer = build_optimizer(model, LearningRates(rate, recurrence_rate or 2 * rate), decay, beta2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "bf16": {"enabled": in_bf16},
        "zero_optimization": {"stage": stage, **BUCKET},
    }
    return build_engine(model, optimizer, build_scheduler(optimizer, run), config)


def train(engine, n_steps=2):
    for _ in range(n_steps):
        engine.backward(engine(random_ids(2, 3, 8), labels=random_ids(2, 4)).loss)
        engine.step()
    return engine


@pytest.fixture
def saved(alone, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine())
    checkpoints.save(engine, STATE, FIGURES)
    return checkpoints, engine


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def break_file(path, how):
    """Damage a file in one of several ways."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(content[:-1])
    else:
        # a flipped byte: the length stays the same
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_training_state_is_restored(alone, tmp_path, stage):
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE, FIGURES)
    drawn = torch.rand(3)
    other = make_engine(stage)
    assert checkpoints.load(other) == Resumed(STATE, FIGURES)
    assert torch.equal(torch.rand(3), drawn)
    found, expected = full_state_dict(other), full_state_dict(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert other.get_lr() == engine.get_lr()


def test_a_run_without_a_checkpoint_starts_at_step_0(alone, tmp_path):
    assert Checkpoints(tmp_path / "none").load(make_engine()) == Resumed()


def test_the_state_of_a_different_version_is_read():
    saved = {"step": 4, "best_value": 0.5, "unheard_of": 1}
    assert TrainerState.of(saved) == TrainerState(step=4, best_value=0.5)


def test_a_checkpoint_from_before_other_metrics_has_its_lowest_loss():
    assert TrainerState.of({"step": 4, "best_loss": 0.5}) == TrainerState(step=4, best_value=0.5)
    assert TrainerState.of({"step": 4, "best_loss": float("inf")}) == TrainerState(step=4)


def test_the_last_and_the_best_checkpoint_are_kept(saved):
    checkpoints, engine = saved
    for step in range(3, 7):
        checkpoints.save(engine, replace(STATE, step=step, best_step=3))
    assert names(checkpoints) == ["step-00000003", "step-00000005", "step-00000006"]


def test_checkpoints_at_multiples_are_kept(saved):
    checkpoints, engine = saved
    checkpoints.keep_every = 3
    for step in range(3, 9):
        checkpoints.save(engine, replace(STATE, step=step, best_step=0))
    assert names(checkpoints) == [f"step-0000000{step}" for step in (3, 6, 7, 8)]


def test_the_manifest_names_every_file_with_its_size_and_checksum(saved):
    checkpoints, _ = saved
    path = checkpoints.folder / "step-00000002"
    content = json.loads((path / "manifest.json").read_text())
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == content["files"].keys() | {"manifest.json"}
    assert {"trainer.json", "process-0.pt"} < files
    assert len(files) == 5
    assert content["files"]["process-0.pt"]["bytes"] == (path / "process-0.pt").stat().st_size
    assert content["step"] == 2
    assert content["versions"]["torch"]


def test_all_files_are_fsynced_before_the_checkpoint_is_renamed(alone, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, module.Path.rename

    def noted_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_rename(path, target):
        events.append(f"{path} -> {target}")
        return rename(path, target)

    monkeypatch.setattr(manifest.os, "fsync", noted_fsync)
    monkeypatch.setattr(module.Path, "rename", noted_rename)
    Checkpoints(tmp_path).save(make_engine(), STATE)
    draft, final = tmp_path / ".step-00000002.tmp", tmp_path / "step-00000002"
    named = events.index(f"{draft} -> {final}")
    written = [str(draft / file.relative_to(final)) for file in final.rglob("*")]
    assert written
    assert set(written) <= set(events[:named])
    assert events.index(str(draft / "manifest.json")) > max(
        events.index(name) for name in written if name.endswith(".pt")
    )
    assert str(tmp_path) in events[named:]


class TestDamage:
    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["missing", "cut off", "turned"])
    @pytest.mark.parametrize(
        "pattern", ["engine/*model_states.pt", "engine/*optim_states.pt", "process-0.pt", "trainer.json"]
    )
    def test_the_newest_undamaged_checkpoint_is_loaded_and_the_damaged_file_named(self, saved, pattern, how, capsys):
        checkpoints, engine = saved
        checkpoints.save(engine, replace(STATE, step=3))
        (file,) = (checkpoints.folder / "step-00000003").glob(pattern)
        break_file(file, how)
        assert checkpoints.load(make_engine()).state == STATE
        printed = capsys.readouterr().out
        word = {"missing": "is missing", "cut off": "is incomplete", "turned": "is damaged"}[how]
        assert f"step-00000003: {file.relative_to(checkpoints.folder / 'step-00000003')} {word}" in printed

    @pytest.mark.slow
    @pytest.mark.parametrize("content", [None, "", "{", '{"files": 3}', "[]", '{"files": {"a": {}}}'])
    def test_a_damaged_manifest_makes_the_run_load_an_older_checkpoint(self, saved, content, capsys):
        checkpoints, engine = saved
        checkpoints.save(engine, replace(STATE, step=3))
        file = checkpoints.folder / "step-00000003" / "manifest.json"
        file.unlink()
        if content is not None:
            file.write_text(content)
        assert checkpoints.load(make_engine()).state == STATE
        assert "manifest.json" in capsys.readouterr().out

    def test_loading_fails_if_all_checkpoints_are_damaged(self, saved):
        checkpoints, engine = saved
        checkpoints.save(engine, replace(STATE, step=3))
        for step in (2, 3):
            break_file(checkpoints.folder / f"step-0000000{step}" / "process-0.pt", "cut off")
        with pytest.raises(
            ValueError, match=r"no checkpoint can be read: .*step-00000003.*step-00000002: process-0.pt"
        ):
            checkpoints.load(make_engine())
        assert names(checkpoints) == ["step-00000002", "step-00000003"]

    def test_a_damaged_checkpoint_does_not_count_as_one_of_the_last(self, saved):
        checkpoints, engine = saved
        for step in (4, 6):
            checkpoints.save(engine, replace(STATE, step=step, best_step=2))
            break_file(checkpoints.folder / f"step-0000000{step}" / "process-0.pt", "cut off")
        other = make_engine()
        assert checkpoints.load(other).state.step == 2
        checkpoints.save(other, replace(STATE, step=3, best_step=0))
        assert {"step-00000002", "step-00000003"} < set(names(checkpoints))
        assert {"damaged-step-00000004", "damaged-step-00000006"} < set(names(checkpoints))


class TestFullDisk:
    @pytest.fixture
    def full_disk(self, monkeypatch):
        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(manifest.os, "fsync", refuse)
            yield patch

    def test_a_full_disk_leaves_the_earlier_checkpoint_undamaged(self, saved, full_disk):
        checkpoints, engine = saved
        with pytest.raises(CheckpointError, match=r"step-00000003 cannot be written \(process 0: .*No space left"):
            checkpoints.save(engine, replace(STATE, step=3))
        assert "step-00000003" not in names(checkpoints)
        full_disk.undo()
        assert checkpoints.load(make_engine()).state == STATE
        # the next checkpoint of the same step replaces it
        checkpoints.save(engine, replace(STATE, step=4))
        assert names(checkpoints) == ["step-00000002", "step-00000004"]

    def test_an_error_in_a_background_write_is_raised_by_wait(self, saved, full_disk):
        checkpoints, engine = saved
        background = Checkpoints(checkpoints.folder, in_background=True)
        background.save(engine, replace(STATE, step=3))
        with pytest.raises(CheckpointError, match="No space left"):
            background.wait()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=["no space", "no permission"])
    def test_a_folder_that_cannot_be_created_is_an_error_with_its_reason(self, saved, monkeypatch, code):
        checkpoints, engine = saved

        def refuse(*_, **__):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(module.Path, "mkdir", refuse)
            # nothing is gathered for a folder that does not exist
            patch.setattr(checkpoints, "_gather", None)
            message = rf"step-00000003 cannot be written \(process 0: .*{os.strerror(code)}"
            with pytest.raises(CheckpointError, match=message):
                checkpoints.save(engine, replace(STATE, step=3))
        assert names(checkpoints) == ["step-00000002"]
        checkpoints.save(engine, replace(STATE, step=4))
        assert names(checkpoints) == ["step-00000002", "step-00000004"]


def test_a_half_removed_checkpoint_is_not_read(saved, monkeypatch):
    checkpoints, engine = saved
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **_: None)
    for step in (3, 4):
        checkpoints.save(engine, replace(STATE, step=step))
    assert "step-00000002" not in names(checkpoints)


def test_a_background_write_holds_the_weights_of_its_start(saved, monkeypatch):
    checkpoints, engine = saved
    background = Checkpoints(checkpoints.folder, in_background=True)
    may_write = threading.Event()
    write = checkpoint_files.write_and_fsync

    def wait_and_write(*arguments):
        assert may_write.wait(timeout=60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_files, "write_and_fsync", wait_and_write)
    expected = full_state_dict(engine)
    background.save(engine, replace(STATE, step=3))
    # train before the file is written
    train(engine, 1)
    assert "step-00000003" not in names(checkpoints)
    assert any(not torch.equal(value, expected[name]) for name, value in full_state_dict(engine).items())
    may_write.set()
    background.wait()
    other = make_engine()
    assert background.load(other).state.step == 3
    found = full_state_dict(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestTrust:
    def test_a_checkpoint_without_a_manifest_needs_trust_checkpoint(self, saved):
        checkpoints, _ = saved
        (checkpoints.folder / "step-00000002" / "manifest.json").unlink()
        with pytest.raises(ValueError, match=r"manifest\.json is missing"):
            checkpoints.load(make_engine())
        assert Checkpoints(checkpoints.folder, trusts=True).load(make_engine()).state == STATE

    def test_a_checkpoint_outside_the_run_needs_trust_checkpoint(self, saved, tmp_path_factory):
        checkpoints, _ = saved
        path = checkpoints.folder / "step-00000002"
        elsewhere = tmp_path_factory.mktemp("elsewhere") / path.name
        shutil.move(path, elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(ValueError, match="the checkpoint is outside the run's folder; add --trust_checkpoint"):
            checkpoints.load(make_engine())
        assert Checkpoints(checkpoints.folder, trusts=True).load(make_engine()).state == STATE

    @pytest.mark.slow
    @pytest.mark.parametrize("trusts", [False, True])
    @pytest.mark.parametrize(
        ("pattern", "stage"),
        [
            ("engine/*model_states.pt", 2),
            ("engine/*optim_states.pt", 2),
            ("process-0.pt", 2),
            # a file that is read when the checkpoint is converted for another ZeRO stage
            ("engine/*model_states.pt", 3),
            ("engine/*optim_states.pt", 3),
        ],
    )
    def test_loading_a_checkpoint_runs_no_code_from_it(self, saved, pattern, stage, trusts, tmp_path_factory):
        checkpoints, _ = saved
        path = checkpoints.folder / "step-00000002"
        made = tmp_path_factory.mktemp("made") / "by a stranger"
        (file,) = path.glob(pattern)
        torch.save({**read_tensors(file), "stranger": Stranger(str(made))}, file)
        # an attacker can write a matching manifest too
        forge(path, file)
        with pytest.raises(ValueError, match="cannot be read"):
            Checkpoints(checkpoints.folder, trusts=trusts).load(make_engine(stage))
        assert not made.exists()
        # check that unpickling this object really has an effect
        pickle.loads(pickle.dumps(Stranger(str(made))))
        assert made.exists()

    def test_a_manifest_with_a_file_outside_the_checkpoint_is_refused(self, saved):
        checkpoints, _ = saved
        path = checkpoints.folder / "step-00000002"
        outside = checkpoints.folder / "outside"
        outside.write_bytes(b"")
        forge(path, outside)
        with pytest.raises(ValueError, match="outside is outside the checkpoint's folder"):
            checkpoints.load(make_engine())


def forge(checkpoint, file):
    """Change the manifest so that it matches a file."""
    manifest_file = checkpoint / "manifest.json"
    content = json.loads(manifest_file.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    content["files"][os.path.relpath(file, checkpoint)] = {"bytes": file.stat().st_size, "sha256": digest}
    manifest_file.write_text(json.dumps(content))


class Stranger:
    """Object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.slow
@pytest.mark.parametrize(("then", "now"), [(2, 3), (3, 2)])
def test_a_different_zero_stage_loads_the_same_weights_and_moments(alone, tmp_path, then, now, capsys):
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine(then, rate=0.001))
    checkpoints.save(engine, STATE)
    other = make_engine(now, rate=0.001)
    assert checkpoints.load(other).state == STATE
    assert names(checkpoints) == ["step-00000002"]
    # DeepSpeed's converter prints a line per parameter; it must be silenced
    assert len(capsys.readouterr().out.splitlines()) == 1
    found, expected = full_state_dict(other), full_state_dict(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert other.get_lr() == engine.get_lr()
    for trained in (engine, other):
        torch.manual_seed(0)
        train(trained, 1)
    found, expected = full_state_dict(other), full_state_dict(engine)
    for name in expected:
        # its exact gradient is 0, so Adam's steps follow rounding noise
        if "k_proj.bias" not in name:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_goes_on_for_two_with_their_metrics_and_new_random_states(alone, tmp_path, stage, monkeypatch):
    checkpoints = Checkpoints(tmp_path, trusts=True)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE, FIGURES)
    drawn = torch.rand(3)
    path = tmp_path / "step-00000002"
    as_if_written_by_two(path, FIGURES | {"loss": 2.0, "n_targets": 5})
    torch.manual_seed(7)
    other = make_engine(stage)
    torch.manual_seed(7)
    resumed = checkpoints.load(other)
    # two ranks took the same two steps in the same 3.5 seconds
    loss = FIGURES["loss"] + 2.0
    assert resumed.metrics == {"loss": loss, "n_targets": 12, "n_tokens": 180, "n_steps": 2, "seconds": 3.5}
    assert resumed.state == STATE
    found, expected = full_state_dict(other), full_state_dict(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    after = torch.rand(3)
    assert not torch.equal(after, drawn)
    # not the numbers that the run drew at its beginning
    torch.manual_seed(7)
    assert not torch.equal(after, torch.rand(3))
    # what all ranks share is known to all, because they decide by it
    monkeypatch.setattr(module, "is_first", lambda: False)
    assert module._continue_process(path, 2, 2) == {"n_steps": 2, "seconds": 3.5}


@pytest.mark.slow
def test_a_second_rank_cannot_publish_a_draft_again(saved, monkeypatch):
    checkpoints, engine = saved
    rename, seen = Path.rename, []
    monkeypatch.setattr(
        Path, "rename", lambda draft, final: (seen.append((draft / ".last").exists()), rename(draft, final))[1]
    )
    checkpoints.save(engine, replace(STATE, step=3))
    assert seen[-1]
    assert not (checkpoints.folder / "step-00000003" / ".last").exists()


def as_if_written_by_two(path, figures):
    """Change the checkpoint of one process: give it a second process with these metrics."""
    trainer = json.loads((path / "trainer.json").read_text())
    trainer["written_by"]["processes"] = 2
    (path / "trainer.json").write_text(json.dumps(trainer))
    second = read_tensors(path / "process-0.pt") | {"figures": figures}
    torch.save(second, path / "process-1.pt")
    (path / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("then_in_bf16", [False, True])
def test_a_different_precision_loads_the_same_weights_and_moments(alone, tmp_path, stage, then_in_bf16):
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine(stage, rate=0.001, in_bf16=then_in_bf16))
    checkpoints.save(engine, STATE)
    other = make_engine(stage, rate=0.001, in_bf16=not then_in_bf16)
    assert checkpoints.load(other).state == STATE
    assert names(checkpoints) == ["step-00000002"]
    found, expected = full_state_dict(other), full_state_dict(engine)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    moments = [_moments(one) for one in (other, engine)]
    assert moments[0]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    assert other.get_lr() == engine.get_lr()
    train(other, 1)
    assert not all(torch.equal(value, expected[name]) for name, value in full_state_dict(other).items())


def _moments(engine):
    states = engine.optimizer.optimizer.state.values()
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


def test_a_checkpoint_of_a_different_model_is_refused(saved):
    with pytest.raises(ValueError, match="the checkpoint belongs to a different model"):
        saved[0].load(make_engine(pre_seq_len=4))


def test_a_checkpoint_with_different_frozen_parameters_is_refused(saved):
    engine = make_engine()
    engine.module.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="the checkpoint belongs to a different model"):
        saved[0].load(engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_settings_of_the_resumed_run_apply(alone, tmp_path, stage):
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE)
    other = make_engine(stage, clip=0.25, decay=0.7, rate=5.0, beta2=0.9)
    checkpoints.load(other)
    assert other.optimizer.clip_grad == 0.25
    assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.0, 0.7}
    assert {group["betas"] for group in other.optimizer.param_groups} == {(0.9, 0.9)}
    assert other.get_lr() == pytest.approx([10 * rate for rate in engine.get_lr()])
    train(engine, 1)
    train(other, 1)
    assert other.get_lr() == pytest.approx([10 * rate for rate in engine.get_lr()])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "now", [{"decay": 0.0}, {"recurrence_rate": 0.5}, {"decay": 0.0, "recurrence_rate": 0.5}], ids=str
)
def test_flags_that_make_parameter_groups_equal_load_the_moments(alone, tmp_path, stage, now):
    """Change to zero weight decay or to one learning rate for all groups, and back."""
    checkpoints = Checkpoints(tmp_path)
    engine = train(make_engine(stage))
    checkpoints.save(engine, STATE)
    for changes in (now, {}):
        other = make_engine(stage, **changes)
        checkpoints.load(other)
        assert_same_moments(other, engine)
        assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.0, changes.get("decay", 0.1)}
        rates = (0.5, changes.get("recurrence_rate", 1.0))
        assert set(other.lr_scheduler.base_lrs) == set(rates)
        shutil.rmtree(tmp_path)
        checkpoints.save(other, STATE)


def assert_same_moments(found, expected):
    states = zip(found.optimizer.optimizer.state.values(), expected.optimizer.optimizer.state.values(), strict=True)
    for state, other in states:
        assert state["exp_avg"].any()
        assert all(torch.equal(state[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))
