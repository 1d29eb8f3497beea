"""Export of checkpoints: the files equal the files that training saves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from launching import assert_one_error, load_script
from runs import flags

CASES = {
    "zero2": {"deepspeed": "ds_configs/zero2.json"},
    "zero3-bf16": {"deepspeed": "ds_configs/zero3.json", "precision": "bf16", "no_repeat_ngram_size": 2},
    "zero3-adapters": {"deepspeed": "ds_configs/zero3.json", "lora_r": 2},
    "zero2-prefix": {"train": "prefix", "task": "sections"},
}


def export(*argv):
    return load_script("export").main([str(part) for part in argv])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def trained(documents, tmp_path, train_main):
    """Return the folder of a run that ended at step 4."""
    assert train_main(flags(documents, tmp_path / "run", max_steps=4, num_beams=3)) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_checkpoint_of_the_best_model_gives_the_files_of_that_model(documents, tmp_path, train_main, changes):
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=4, **changes)) == 0
    state = json.loads((run / "checkpoints" / "step-00000004" / "trainer.json").read_text())["state"]
    best = run / "checkpoints" / f"step-{state['best_step']:08d}"
    assert export(best, tmp_path / "exported") == 0
    assert contents(tmp_path / "exported") == contents(run / "model")


def test_another_checkpoint_gives_another_model_and_a_run_its_newest(trained, tmp_path, capsys):
    before = contents(trained / "model")
    assert export(trained / "checkpoints" / "step-00000002", tmp_path / "two") == 0
    assert export(trained, tmp_path / "newest") == 0
    newest = trained / "checkpoints" / "step-00000004"
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/newest: the model of {newest}"
    assert export(newest, tmp_path / "four") == 0
    weights = {name: contents(tmp_path / name)["model.safetensors"] for name in ("two", "newest", "four")}
    assert weights["two"] != weights["newest"] == weights["four"]
    assert contents(trained / "model") == before
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "two").config.segment_size == 16


def test_a_run_without_a_saved_model_is_exported_with_a_warning(trained, tmp_path, capsys):
    own = GenerationConfig.from_pretrained(trained / "model")
    assert own.num_beams == 3
    shutil.rmtree(trained / "model")
    capsys.readouterr()
    assert export(trained, tmp_path / "exported") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"warning: {trained}/model does not exist, so the run's settings of generation are not exported",
        f"{tmp_path}/exported: the model of {trained}/checkpoints/step-00000004",
    ]
    assert GenerationConfig.from_pretrained(tmp_path / "exported").num_beams != 3
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported")


def test_a_damaged_checkpoint_is_named_or_passed_over(trained, tmp_path, capsys):
    newest = trained / "checkpoints" / "step-00000004"
    (newest / "process-0.pt").write_bytes(b"")
    assert export(newest, tmp_path / "model") == 2
    assert_one_error(capsys.readouterr(), f"no checkpoint can be read: {newest}: process-0.pt is incomplete")
    assert export(trained, tmp_path / "model") == 0
    assert capsys.readouterr().out.endswith("step-00000002\n")
    # a checkpoint alone has no architecture
    shutil.copytree(trained / "checkpoints" / "step-00000002", tmp_path / "copies" / "of" / "step-00000002")
    assert export(tmp_path / "copies" / "of" / "step-00000002", tmp_path / "other") == 2
    assert_one_error(capsys.readouterr(), "config.json is missing; a checkpoint needs the folder of its run")


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert export(tmp_path, tmp_path / "model") == 2
    assert_one_error(capsys.readouterr(), f"{tmp_path}: no checkpoint; give the folder of a run, or RUN/checkpoints/")
    assert export(tmp_path, tmp_path) == 2
    assert_one_error(capsys.readouterr(), f"{tmp_path}: the folder exists already; give a new folder")


class Code:
    """Object that creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_checkpoint_is_refused_and_not_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    # an attacker would also write a manifest that fits
    monkeypatch.setattr("recurrent_bart.training.export.problems", lambda folder: [])
    newest = trained / "checkpoints" / "step-00000004"
    (file,) = newest.glob("engine/*optim_states.pt")
    torch.save(Code(tmp_path / "run by the file"), file)
    assert export(newest, tmp_path / "model") == 2
    assert_one_error(capsys.readouterr(), f"{newest}: cannot be read")
    assert not (tmp_path / "run by the file").exists()
