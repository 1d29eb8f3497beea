"""A model card says what the run did, and nothing that it did not do."""

import pytest
import yaml

from recurrent_bart.evaluation.bootstrap import Interval
from recurrent_bart.monitoring.fields import WORD_SCORES
from recurrent_bart.training.model_card import FILE_NAME, write_model_card


def card_of(folder, model=None, scores=(), data=None):
    write_model_card(folder, {"arguments": {"model": model or {}, "data": data or {}}}, 3, 1.5, dict(scores))
    return (folder / FILE_NAME).read_text()


@pytest.mark.parametrize("commit", [None, "0123abc"])
def test_a_commit_is_stated_if_it_is_known(tmp_path, commit):
    write_model_card(tmp_path, {"git_commit": commit, "versions": {"recurrent-bart": "0.1.0"}}, 3, 1.5, {})
    card = (tmp_path / FILE_NAME).read_text()
    assert ("Code: commit 0123abc. Packages: recurrent-bart 0.1.0." in card) == (commit is not None)
    assert "Packages: recurrent-bart 0.1.0." in card
    assert "None" not in card


@pytest.mark.parametrize(
    ("model", "has_state"),
    [({}, True), ({"pre_seq_len": 4}, True), ({"pre_seq_len": 0}, False), ({"recurrence": "none"}, False)],
)
def test_only_a_model_with_a_state_carries_one(tmp_path, model, has_state):
    assert ("A state is carried" in card_of(tmp_path, model)) == has_state


def test_every_score_has_its_meaning(tmp_path):
    card = card_of(tmp_path, scores={"rouge1_words": Interval(12.0, None, None)})
    assert f"| rouge1_words | 12.00 | {WORD_SCORES['rouge1_words']} |" in card


@pytest.mark.parametrize(
    ("data", "trained_on", "measured_on"),
    [
        ({}, "documents of a file", "documents of a file"),
        ({"dataset": "stdlib"}, "stdlib", "stdlib"),
        ({"dataset": "owner/papers"}, "owner/papers", "owner/papers"),
        ({"dataset": "/home/me/papers"}, "papers", "papers"),
        ({"dataset": "stdlib", "train_file": "/home/me/a.jsonl"}, "a.jsonl", "a.jsonl"),
        ({"dataset": "owner/papers", "train_file": "/home/me/a.jsonl"}, "a.jsonl", "a.jsonl"),
        ({"dataset": "owner/papers", "validation_file": "/home/me/b.jsonl"}, "owner/papers", "b.jsonl"),
        (
            {"dataset": "stdlib", "train_file": "/home/me/a.jsonl", "validation_file": "/home/me/b.jsonl"},
            "a.jsonl",
            "b.jsonl",
        ),
    ],
)
def test_the_card_names_the_documents_that_were_read(tmp_path, data, trained_on, measured_on):
    card = card_of(tmp_path, scores={"rouge1": Interval(12.0, None, None)}, data=data)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["model-index"][0]["results"][0]["dataset"]["name"] == measured_on
    assert f"# Recurrent BART, trained on {trained_on}\n" in body
    assert f"3 optimizer steps on `{trained_on}`." in body
    assert "/home/me" not in card
    assert ("stdlib" in card) == ("stdlib" in (trained_on, measured_on))
