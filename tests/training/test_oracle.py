"""Training with an oracle: from flags, over several ranks, and resumed."""

import json
from pathlib import Path

import pytest
import torch

from forked import launched, run_script
from recurrent_bart.data.batches import BatchOrder
from recurrent_bart.model.scheduled_sampling import Oracle, gold_probability
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.description import oracle_at
from recurrent_bart.training.experiment import run_experiment
from recurrent_bart.training.run_arguments import RunArguments
from runs import flags

WORKER = Path(__file__).with_name("oracle_worker.py")


def case(kind, stage, task="document", checkpointing="none", share=0.0, temperature=0.0, **fields):
    """Build a case whose inputs do not depend on random draws: no target words, no noise, no dropout."""
    oracle = {"kind": kind, "gold_probability": share, "temperature": temperature}
    return {"oracle": oracle, "stage": stage, "task": task, "checkpointing": checkpointing, "fields": fields}


EXACT = {
    "word-zero3-document": case("word", 3),
    "word-zero3-windows-by-segment": case("word", 3, "sections", "segment", bptt_depth=1),
    "sentence-zero2-windows": case("sentence", 2, "sections", bptt_depth=1),
    "sentence-zero3-document-by-layer": case("sentence", 3, checkpointing="layer"),
    "sentence-zero3-windows-concat": case("sentence", 3, "sections", bptt_depth=1, prefix_attention="concat"),
}
RANDOM = {
    f"{kind}-zero3-drawn": case(kind, 3, share=0.5, temperature=1.0, dropout=0.1, hidden_dropout_prob=0.1)
    for kind in ("word", "sentence")
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all cases in one start of two processes."""
    output = tmp_path_factory.mktemp("oracle") / "results.pt"
    cases = EXACT | RANDOM
    ended = run_script(WORKER, json.dumps(list(cases.values())), output, environments=launched(2), timeout=240)
    assert ended.codes == [0, 0], ended.text()
    return dict(zip(cases, torch.load(output, weights_only=True), strict=True))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_with_targets_of_different_lengths_equal_one(results):
    for name in EXACT:
        found, expected = results[name]["zero"], results[name]["alone"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
        for key, weight in expected["weights"].items():
            assert torch.allclose(found["weights"][key], weight, rtol=1e-5, atol=1e-6), (name, key)
        assert found["shares"] == [0.0] * 3


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_that_draw_words_of_their_own_train(results):
    for name in RANDOM:
        losses = results[name]["zero"]["losses"]
        assert torch.tensor(losses).isfinite().all(), name
        assert len(set(losses)) == 3
        assert results[name]["zero"]["shares"] == [0.5] * 3


def test_by_default_there_is_no_oracle():
    assert oracle_at(parse_arguments([]).run, BatchOrder([1] * 8, 4, seed=0), step=3) is None


def test_the_flags_make_the_oracle_of_a_step():
    given = {"oracle": "sentence", "oracle_decay": 2, "oracle_temperature": 0.5, "oracle_beams": 5}
    run = parse_arguments([f"--{name}={value}" for name, value in given.items()]).run
    # three steps are one epoch
    order = BatchOrder([1] * 12, 4, seed=0)
    assert oracle_at(run, order, 0) == Oracle("sentence", 2 / 3, 0.5, 5)
    assert oracle_at(run, order, 6).gold_probability == pytest.approx(gold_probability(2.0, 2.0))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("oracle", "words", "--oracle words: allowed are none, word, sentence"),
        ("oracle_decay", 0.5, "--oracle_decay 0.5: must be at least 1"),
        ("oracle_temperature", -1.0, "--oracle_temperature -1.0: must be at least 0"),
        ("oracle_beams", 0, "--oracle_beams 0: must be at least 1"),
    ],
)
def test_flags_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(**{name: value})


def records(folder):
    """Return the logged records of the steps, without values that depend on time."""
    names = ("step", "loss", "gradient_norm", "gold_probability")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines if "gold_probability" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["word", "sentence"])
def test_a_run_logs_the_share_and_resumes_to_the_bit(alone, documents, tmp_path, kind):
    changes = {"oracle": kind, "oracle_decay": 1, "task": "sections", "dropout": 0.1, "lr_scheduler": "constant"}
    run_experiment(parse_arguments(flags(documents, tmp_path / "whole", **changes, max_steps=4)), alone)
    run_experiment(parse_arguments(flags(documents, tmp_path / "resumed", **changes, max_steps=2)), alone)
    run_experiment(parse_arguments(["--resume", str(tmp_path / "resumed"), "--max_steps", "4"]), alone)
    found = records(tmp_path / "resumed")
    assert found == records(tmp_path / "whole")
    # a step reads 2 of 24 documents
    assert [share for *_, share in found] == pytest.approx([gold_probability(step / 12, 1) for step in range(4)])
