"""Workloads: flags, and documents of the stated length."""

import json
from pathlib import Path

import pytest

from recurrent_bart.benchmarks.training.results import Launch
from recurrent_bart.benchmarks.training.workloads import Work
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.preparation import open_splits

RUN = Launch("runs", 2, Path("some/zero3.json"))


def work(*given, **changes):
    return Work(**{"device": "cpu", "given": given, "steps": 4, "warmup": 1, "rounds": 1, **changes})


def test_flags_that_are_given_hold_instead_of_the_defaults():
    arguments = parse_arguments(work("--segment_size", "32", "--log_every=2").flags(RUN, Path("setting")))
    assert (arguments.model.segment_size, arguments.run.log_every, arguments.run.max_steps) == (32, 2, 4)
    assert (arguments.run.deepspeed, arguments.run.output_dir) == ("some/zero3.json", "setting/runs-2-zero3")
    assert arguments.run.eval_every > 4
    assert arguments.tracking.wandb_mode == "disabled"


def test_a_run_is_logged_step_by_step_and_a_loop_as_runs_are():
    assert work().arguments("runs").run.log_every == 1
    # each log line synchronizes with the GPU
    assert work(device="cuda").arguments("runs").run.log_every > 1
    assert work().arguments("loop").run.log_every == parse_arguments([]).run.log_every


def test_on_gpus_it_is_bart_base_over_eight_segments():
    model = work(device="cuda").arguments("runs").model
    assert (model.model_size, model.segment_size, model.max_n_segments, model.vocab_size) == ("base", 512, 8, 50265)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--output_dir", "x"), "--output_dir: the benchmark sets this flag"),
        (("--max_steps=3",), "--max_steps=3: the benchmark sets this flag"),
        (("--resume", "x"), "--resume: the benchmark sets this flag"),
        (("--max_n_segments", "-1"), "--max_n_segments"),
        (("--modelsize", "base"), "unknown argument --modelsize; did you mean --model_size?"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        work(*given)


def test_a_warm_up_leaves_steps_to_measure():
    with pytest.raises(ValueError, match="--warmup 4: must be below --steps 4"):
        work(warmup=4)
    with pytest.raises(ValueError, match="--rounds 0"):
        work(rounds=0)


def test_documents_fill_all_of_their_segments_and_targets_their_length(tmp_path):
    given = work("--segment_size", "16", "--max_n_segments", "3", "--vocab_size", "50", "--max_target_length", "9")
    given.documents(most_processes=2).write(tmp_path)
    arguments = parse_arguments(given.flags(RUN, tmp_path))
    tokenizer, config, splits = open_splits(arguments.model, arguments.data)
    documents = splits["train"]
    # two processes with two documents each, for four steps
    assert len(documents.corpus) == 16
    assert len(tokenizer) == config.vocab_size == 50
    batch = documents.collator([{**row, "index": number} for number, row in enumerate(documents.corpus)])
    assert batch.input_ids.shape == (16, 3, 16)
    assert batch.n_tokens() == 16 * 3 * 16
    assert batch.labels.shape == (16, 9)
    assert batch.n_targets() == 16 * 9
    assert int(batch.input_ids.max()) == 49
    assert len({json.dumps(row["sections"]) for row in documents.corpus}) == 16
