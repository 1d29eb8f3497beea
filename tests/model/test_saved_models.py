"""Tests of the error messages for paths without a model and for unreadable models."""

import json

import pytest
import torch

from recurrent_bart.model.saved_models import check_model_place, reading_model


@pytest.fixture
def run(tmp_path):
    """Return a run's folder with a model and a checkpoint."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"arguments": {}, "model": {"model_type": "x"}}))
    (tmp_path / "run" / "model" / "config.json").write_text(json.dumps({"model_type": "recurrent_bart"}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text("{}")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "this is the folder of a run; give the model of the run, {run}/model"),
        ("model/config.json", "this is a file; give the folder of the model, {run}/model"),
        ("checkpoints/step-00000002", "this is a checkpoint; continue training with --resume RUN"),
        ("checkpoints", "config.json is missing; give the folder of a model"),
        ("missing", "no such folder; give the folder of a model"),
    ],
)
@pytest.mark.parametrize("may_be_on_hub", [False, True])
def test_what_is_no_model_is_refused_with_what_to_give(run, place, message, may_be_on_hub):
    path = str(run / place)
    with pytest.raises(ValueError, match=f"--model {path}: {message.format(run=run)}"):
        check_model_place("--model", path, may_be_on_hub)


def test_a_run_without_a_model_is_named(run):
    (run / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match="this run has not saved a model yet"):
        check_model_place("--model", str(run))


def test_a_model_is_accepted(run):
    check_model_place("--model", str(run / "model"))
    # configurations of old BART have no model type; the model loader reports damaged files
    for content in ("{}", '{"d_model": 8}', "{"):
        (run / "model" / "config.json").write_text(content)
        check_model_place("--model", str(run / "model"))


@pytest.mark.parametrize("name", ["facebook/bart-base", "gpt2", "a.b/c_d-1"])
def test_names_on_the_hub_are_for_the_hub_to_know(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model_place("--model_name_or_path", name, may_be_on_hub=True)
    with pytest.raises(ValueError, match="no such folder"):
        check_model_place("--model", name)


@pytest.mark.parametrize("name", ["/nowhere/bart", "./bart", "../bart", "runs/a/model", "bart/", "~/bart"])
def test_paths_are_no_names_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--model_name_or_path {name}: no such folder; give the folder of a model"):
        check_model_place("--model_name_or_path", name, may_be_on_hub=True)


def test_what_cannot_be_read_is_told_in_one_line():
    message = r"--model x: the model cannot be read \(a b\); if a file is incomplete"
    with pytest.raises(ValueError, match=message), reading_model("--model", "x"):
        raise RuntimeError("a\n b")
    # an out-of-memory error is not a damaged file
    with pytest.raises(torch.OutOfMemoryError), reading_model("--model", "x"):
        raise torch.OutOfMemoryError
