"""Run with a curriculum: stages end by steps and by loss, are logged, and are resumed."""

import json

import pytest

from recurrent_bart.training.session import Session
from runs import flags

# one evaluation after the last step, because an evaluation takes longer than several steps
EIGHT_STEPS = {"max_steps": 8, "eval_every": 8}


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stages(folder):
    return [record["curriculum_segments"] for record in read_metrics(folder) if "loss" in record]


def figures(folder):
    names = ("step", "loss", "gradient_norm", "curriculum_segments", "validation_loss")
    return [{name: record[name] for name in names if name in record} for record in read_metrics(folder)]


@pytest.mark.slow
def test_stages_end_after_their_steps(documents, tmp_path, train_main, capsys):
    assert train_main(flags(documents, tmp_path / "run", curriculum="1,2,3", curriculum_steps=3, **EIGHT_STEPS)) == 0
    assert stages(tmp_path / "run") == [1, 1, 1, 2, 2, 2, 3, 3]
    assert "curriculum 1 to 1 / 2 / 3 segments per document; the next stage after 3 steps\n" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_number_of_steps_all_stages_have_the_same(documents, tmp_path, train_main):
    assert train_main(flags(documents, tmp_path / "run", curriculum="1,2", eval_every=6)) == 0
    assert stages(tmp_path / "run") == [1, 1, 1, 2, 2, 2]


@pytest.mark.slow
def test_a_stage_ends_at_its_loss_which_all_of_a_line_must_be_of(documents, tmp_path, train_main):
    changes = {"curriculum": "1,2,3", "curriculum_steps": 3, "curriculum_loss": 100.0, "log_every": 2, **EIGHT_STEPS}
    assert train_main(flags(documents, tmp_path / "run", **changes)) == 0
    assert stages(tmp_path / "run") == [1, 2, 3, 3]
    changes |= {"curriculum_loss": 0.1}
    assert train_main(flags(documents, tmp_path / "other", **changes)) == 0
    # stages end after steps 3 and 6
    assert stages(tmp_path / "other") == [1, 2, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_run_resumed_within_a_stage_goes_on_as_if_nothing_had_been(
    documents, tmp_path, train_main, monkeypatch, n_workers
):
    changes = {"curriculum": "1,2,3", "curriculum_steps": 3, "max_steps": 8, "dropout": 0.1}
    changes |= {"eval_every": 5, "dataloader_num_workers": n_workers}
    assert train_main(flags(documents, tmp_path / "whole", **changes)) == 0
    log = Session.log

    def cut_off(session, record):
        log(session, record)
        if record["step"] == 6:
            raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", cut_off)
        assert train_main(flags(documents, tmp_path / "resumed", **changes)) != 0
    assert train_main(["--resume", str(tmp_path / "resumed")]) == 0
    assert figures(tmp_path / "resumed") == figures(tmp_path / "whole")
    assert stages(tmp_path / "resumed")[-4:] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "2,1"}, "--curriculum 2,1: must start with at least 1"),
        ({"curriculum": "1;2"}, "--curriculum 1;2: must be whole numbers"),
        ({"curriculum_loss": 1.0}, "need --curriculum"),
        ({"curriculum": "1,2", "curriculum_steps": 0}, "--curriculum_steps 0: must be at least 1"),
    ],
)
def test_a_mistake_is_told(documents, tmp_path, train_main, capsys, changes, message):
    assert train_main(flags(documents, tmp_path / "run", **changes)) != 0
    assert message in capsys.readouterr().err
