"""Runs that end in an error or go back to an earlier checkpoint, and evaluations that are repeated."""

import json
import shutil
import time

import pytest

from recurrent_bart.checkpointing.checkpoints import Checkpoints
from recurrent_bart.evaluation.evaluator import Evaluator
from recurrent_bart.training.lifecycle.interruption import Interruption
from recurrent_bart.training.lifecycle.stall import StallWatch
from recurrent_bart.training.session import Session
from runs import flags

pytestmark = pytest.mark.slow


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_checkpoint_in_the_background_is_complete_when_a_run_ends_with_an_error(
    documents, tmp_path, train_main, monkeypatch
):
    publish = Checkpoints._publish
    monkeypatch.setattr(Checkpoints, "_publish", lambda *given: time.sleep(1) or publish(*given))
    monkeypatch.setattr("recurrent_bart.training.trainer.DeepSpeedEngine.was_step_applied", lambda engine: False)
    arguments = flags(documents, tmp_path / "run", max_skipped_steps=3, async_save=True, max_steps=9, eval_every=9)
    assert train_main(arguments) == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_sampled_texts_change_no_step_and_are_the_same_in_a_repeated_evaluation(
    documents, tmp_path, train_main, monkeypatch
):
    texts, evaluate, summarise = [], Session.evaluate, Evaluator.summarise

    def summarise_and_note(*given):
        samples = summarise(*given)
        texts.append([sample.generated for sample in samples])
        return samples

    def evaluate_twice(session):
        evaluate(session)
        return evaluate(session)

    monkeypatch.setattr(Evaluator, "summarise", summarise_and_note)
    monkeypatch.setattr(Session, "evaluate", evaluate_twice)
    for name, sampled in (("greedy", {}), ("sampled", {"do_sample": True})):
        assert train_main(flags(documents, tmp_path / name, max_steps=4, **sampled)) == 0
    assert losses(tmp_path / "sampled") == losses(tmp_path / "greedy")
    # evaluations after steps 2 and 4, each of them twice
    first, again, later, later_again = texts[4:]
    assert first == again
    assert later == later_again
    assert texts[0] == texts[1] != first


@pytest.mark.parametrize("is_missing", [False, True])
def test_a_model_from_after_the_checkpoint_is_replaced(
    documents, tmp_path, train_main, monkeypatch, capsys, is_missing
):
    values = iter([9.0, 5.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr(Evaluator, "loss", lambda *_: next(values))
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=4)) == 0
    # as if the checkpoint of step 4, whose model has the lowest loss, could not be written
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    if is_missing:
        shutil.rmtree(run / "model")
    capsys.readouterr()
    assert train_main(["--resume", str(run), "--max_steps", "6", "--learning_rate", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"warning: {run}/model is not the model of step 2; the next evaluation writes it" in printed
    assert f"saved      {run}/model, the model after step 4: validation loss 4.0000, the lowest" in printed


def test_the_order_of_documents_keeps_its_seed_and_sizes(documents, tmp_path, train_main):
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=2)) == 0
    assert train_main(["--resume", str(run), "--max_steps", "4", "--seed", "7"]) == 0
    for step in (2, 4):
        state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text())["state"]
        assert state["order_seed"] == 42
        assert state["order_sizes"] == [16, 16, 8]


def test_languages_of_a_tokenizer_without_codes_are_refused_at_once(documents, tmp_path, train_main, capsys):
    assert train_main([*flags(documents, tmp_path / "run"), "--source_lang", "en_XX"]) == 2
    assert "--source_lang en_XX" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_resumed_run_leaves_its_tokenizer_as_it_is(documents, tmp_path, train_main):
    run = tmp_path / "run"
    assert train_main(flags(documents, run, max_steps=2)) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (run / "tokenizer").iterdir()}
    assert before
    assert train_main(["--resume", str(run), "--max_steps", "4"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (run / "tokenizer").iterdir()} == before


def test_patience_counts_anew_after_a_change_of_what_is_measured(documents, tmp_path, train_main, monkeypatch):
    values = iter([9.0, 3.0, 4.0, 4.0])
    monkeypatch.setattr(Evaluator, "loss", lambda *_: next(values))
    run = tmp_path / "run"

    def n_worse(step):
        return json.loads((run / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text())["state"]["n_worse"]

    assert train_main(flags(documents, run, max_steps=4)) == 0
    assert train_main(["--resume", str(run), "--max_steps", "6", "--max_target_length", "7"]) == 0
    assert [n_worse(step) for step in (2, 4, 6)] == [0, 1, 1]


def test_each_batch_of_an_evaluation_is_a_sign_of_life(documents, tmp_path, train_main, monkeypatch):
    events, ask = [], Interruption.ask
    monkeypatch.setattr(StallWatch, "beat", lambda watch: events.append("beat"))
    monkeypatch.setattr(Interruption, "ask", lambda *given: events.append("ask") or ask(*given))
    # the end of the watch waits for a sign of life
    monkeypatch.setattr(StallWatch, "__exit__", lambda *_: None)
    assert train_main(flags(documents, tmp_path / "run", max_steps=2)) == 0
    asked = [number for number, event in enumerate(events) if event == "ask"]
    assert len(asked) > 2
    assert all(events[number - 1] == "beat" for number in asked)
