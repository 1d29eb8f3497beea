"""Export of checkpoints: the files equal the files that training saves."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from transformers import AutoModelForSeq2SeqLM, BartForConditionalGeneration, GenerationConfig

from launching import assert_one_error, load_script
from recurrent_bart.evaluation.mean_scores import mean_scores
from recurrent_bart.evaluation.predictions import read_predictions, write_predictions
from recurrent_bart.run_folder import RunFolder
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


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_checkpoint_of_the_best_model_gives_the_files_of_that_model(documents, tmp_path, train_main, changes):
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=4, **changes)) == 0
    state = json.loads((run / "checkpoints" / "step-00000004" / "trainer.json").read_text())["state"]
    best = run / "checkpoints" / f"step-{state['best_step']:08d}"
    assert export(best, tmp_path / "exported") == 0
    assert contents(tmp_path / "exported") == contents(run / "model")


@pytest.mark.slow
def test_the_card_has_data_flags_results_and_use_but_no_path_of_the_machine(documents, tmp_path, train_main):
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=4, learning_rate=0.02)) == 0
    card = (run / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown"
    assert front["pipeline_tag"] == "summarization"
    scores = mean_scores(read_predictions(run / "predictions.jsonl"))
    (result,) = front["model-index"][0]["results"]
    assert {item["name"]: item["value"] for item in result["metrics"]}["rouge1"] == round(scores["rouge1"].mean, 4)
    assert f"| rouge1 | {scores['rouge1']:.2f} |" in body
    assert "| `--learning_rate` | `0.02` |" in body
    assert "| `--train_file` | `train.jsonl` |" in body
    assert "stdlib" not in card
    assert "trust_remote_code=True" in body
    assert str(tmp_path) not in card
    assert str(documents) not in card


@pytest.mark.slow
def test_a_card_has_the_scores_of_its_own_step_or_none(trained, tmp_path):
    """The run keeps the texts of its last best model only; the first model was the best at its time."""
    run = RunFolder(trained)
    predictions = [
        replace(prediction, scores=prediction.scores | {"rouge1": 30.0 + number})
        for number, prediction in enumerate(read_predictions(run.predictions_file))
    ]
    write_predictions(run.predictions_file, predictions)
    logged = {record["step"]: record for record in run.read_metrics() if "rouge1" in record}
    run.append_metrics(logged[4] | {name: score.mean for name, score in mean_scores(predictions).items()})
    scores = {}
    for step in (2, 4):
        checkpoint = run.checkpoints / f"step-{step:08d}"
        assert json.loads((checkpoint / "trainer.json").read_text())["state"]["best_step"] == step
        assert export(checkpoint, tmp_path / f"{step}") == 0
        card = (tmp_path / f"{step}" / "README.md").read_text()
        assert f"| loss | {logged[step]['validation_loss']:.4f} |" in card
        scores[step] = re.findall(r"^\| rouge1 \| ([\d.]+)", card, flags=re.MULTILINE)
    assert scores == {2: [], 4: ["31.00"]}


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_others_may_read_a_model_as_the_umask_says(trained, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert export(trained, tmp_path / "out") == 0
    finally:
        os.umask(before)
    assert tmp_path.joinpath("out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


@pytest.mark.slow
def test_a_plain_bart_has_the_backbones_weights(documents, tmp_path, train_main, capsys):
    for name, size in (("plain", 0), ("recurrent", 3)):
        assert train_main(flags(documents, tmp_path / name, max_steps=2, pre_seq_len=size)) == 0
        capsys.readouterr()
        assert export(tmp_path / name, tmp_path / f"{name}-bart", "--plain_bart") == 0
        assert ("lacks the recurrence" in capsys.readouterr().err) == (size > 0)
        whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name / "model").eval()
        bart = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"{name}-bart").eval()
        assert type(bart) is BartForConditionalGeneration
        ids = torch.randint(5, 100, (2, 14))
        labels = torch.randint(5, 100, (2, 6))
        equal = torch.allclose(whole(ids, labels=labels).logits, bart(ids, labels=labels).logits, atol=1e-5)
        assert equal == (size == 0)


@pytest.mark.slow
def test_a_model_is_uploaded_to_a_private_repository(trained, tmp_path, capsys, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **how):
            calls.append((name, how))
            return RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, folder_path, repo_id, **_):
            calls.append((repo_id, {path.name for path in folder_path.iterdir()}))

        def repo_info(self, repo_id):
            assert repo_id == "me/papers"
            return SimpleNamespace(private=is_private)

    is_private = True
    script = load_script("export")
    monkeypatch.setattr(script, "HfApi", Hub)
    assert export(trained, tmp_path / "out", "--push_to_hub", "papers") == 0
    assert calls[0] == ("papers", {"private": True, "exist_ok": True})
    assert calls[1][0] == "me/papers"
    assert {"README.md", "config.json", "installed_package.py", "model.safetensors"} <= calls[1][1]
    assert "uploaded to https://huggingface.co/me/papers" in capsys.readouterr().out
    is_private = False
    assert export(trained, tmp_path / "public", "--push_to_hub", "papers") == 2
    assert "--push_to_hub papers: the repository is public" in capsys.readouterr().err
    assert len(calls) == 3
    assert export(trained, tmp_path / "allowed", "--push_to_hub", "papers", "--public") == 0
    assert calls[-1][0] == "me/papers"
    is_private = True
    monkeypatch.setattr(Hub, "upload_folder", lambda *_, **__: (_ for _ in ()).throw(OSError("not logged in")))
    assert export(trained, tmp_path / "again", "--push_to_hub", "papers") == 2
    assert f"--push_to_hub papers: not logged in; the model is in {tmp_path}/again" in capsys.readouterr().err


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
