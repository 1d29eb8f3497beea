"""Length of a run: from its flags, its documents and the position of a resumed run."""

import json

import pytest

from recurrent_bart.checkpointing.checkpoints import TrainerState
from recurrent_bart.data.batches import BatchOrder
from recurrent_bart.data.token_batches import TokenBatchOrder
from recurrent_bart.training.arguments import parse_arguments
from recurrent_bart.training.run_length import with_length
from runs import flags
from training.resume_worker import noting_documents, train, train_until_cut_off
from training.test_resume import metrics, read_notes

LENGTHS = [1, 2, 3, 4, 1, 2, 8, 1, 5, 1] * 10


def by_documents(global_batch, **place):
    return BatchOrder(LENGTHS, global_batch, seed=3, **place)


def by_tokens(n_batches, **place):
    return TokenBatchOrder(LENGTHS, place.pop("most", 9), n_batches, seed=3, **place)


def length(argv, order, state=None, changes=None):
    return with_length(parse_arguments(argv), order, state or TrainerState(), changes or {}).run


@pytest.mark.parametrize("make", [by_documents, by_tokens])
@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("n_documents", [1, 30, 100, 101, 250, 300])
def test_it_is_the_fewest_steps_that_read_so_many_documents(make, size, n_documents):
    order = make(size)
    step = order.steps_to_read(n_documents)
    assert order.documents_before(step) >= n_documents > order.documents_before(step - 1)


@pytest.mark.parametrize("make", [by_documents, by_tokens])
@pytest.mark.parametrize("first_step", [1, 9, 30])
def test_a_run_that_goes_on_has_the_length_that_it_had(make, first_step):
    whole = make(4)
    position = {"first_step": first_step, "first_document": whole.documents_before(first_step)}
    for n_documents in (150, 300, 301):
        assert make(4, **position).steps_to_read(n_documents) == max(first_step, whole.steps_to_read(n_documents))


@pytest.mark.parametrize("make", [by_documents, by_tokens])
def test_a_run_that_goes_on_with_other_batches_reads_as_many_documents(make):
    position = {"first_step": 10, "first_document": make(4).documents_before(10)}
    other = make(8, **position)
    step = other.steps_to_read(300)
    assert other.documents_before(step) >= 300 > other.documents_before(step - 1)
    assert step < make(4).steps_to_read(300)


@pytest.mark.parametrize(
    ("argv", "max_steps"),
    [
        ([], 50),
        (["--dataset", "papers"], 75),
        (["--train_file", "papers.jsonl"], 75),
        (["--dataset", "papers", "--num_train_epochs", "0.1"], 3),
        (["--num_train_epochs", "0.1"], 3),
        (["--num_train_epochs", "0.0001"], 1),
        (["--dataset", "papers", "--max_steps", "7"], 7),
    ],
)
def test_the_length_follows_the_flags_and_else_the_documents(argv, max_steps):
    assert length(argv, by_documents(4)).max_steps == max_steps


def test_warm_up_evaluations_and_stages_follow_the_length():
    run = length(["--num_train_epochs", "20", "--warmup_ratio", "0.2", "--curriculum", "1,2"], by_documents(2))
    assert (run.max_steps, run.warmup_steps, run.eval_every) == (1000, 200, 100)
    assert run.build_curriculum().stage_steps == 500


def test_a_run_shorter_than_its_warm_up_is_refused_unless_it_is_resumed(tmp_path):
    argv = ["--num_train_epochs", "1", "--warmup_steps", "60"]
    with pytest.raises(ValueError, match="--warmup_steps 60: must be at most 50, the steps of the run"):
        length(argv, by_documents(2))
    arguments = parse_arguments(argv)
    arguments.run.resume = str(tmp_path)
    assert with_length(arguments, by_documents(2), TrainerState(), {}).run.warmup_steps == 50


def test_a_given_length_must_not_be_below_what_is_done():
    state, order = TrainerState(step=30), by_documents(4, first_step=30, first_document=120)
    with pytest.raises(ValueError, match="--max_steps 29: must be at least 30, the steps that the run has done"):
        length(["--max_steps", "29"], order, state)
    argv, changes = ["--num_train_epochs", "1.1"], {"num_train_epochs": (3.0, 1.1)}
    with pytest.raises(
        ValueError, match=r"--num_train_epochs 1.1: must be at least 1\.20, the epochs that the run has"
    ):
        length(argv, order, state, changes)
    # the last step of a finished run reads more documents than needed
    assert length(argv, order, state).max_steps == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"tokens_per_batch": 80}, {"task": "sections"}, {"curriculum": "1,2,3"}],
    ids=["documents", "tokens", "sections", "curriculum"],
)
def test_a_run_of_epochs_that_is_resumed_equals_one_that_was_never_cut_off(alone, documents, tmp_path, changes):
    """Check 30 documents of 24, with rates and evaluations that follow from the length."""
    given = {"num_train_epochs": 1.25, "eval_every": 0, "save_every": 3, "warmup_ratio": 0.3, **changes}
    argv = {name: flags_of_epochs(documents, tmp_path / name, given) for name in ("whole", "resumed")}
    train(alone, argv["whole"])
    train_until_cut_off(alone, argv["resumed"])
    train(alone, ["--resume", str(tmp_path / "resumed")])
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    config = json.loads((tmp_path / "resumed" / "config.json").read_text())
    assert config["arguments"]["run"]["max_steps"] == -1
    resolved = config["resolved"]
    assert resolved["num_train_epochs"] >= 1.25
    if "tokens_per_batch" not in changes:
        assert (resolved["max_steps"], resolved["warmup_steps"], resolved["eval_every"]) == (15, 5, 25)


@pytest.mark.slow
def test_a_run_of_epochs_that_is_resumed_with_larger_steps_reads_as_many_documents(alone, documents, tmp_path):
    """Check 30 documents: three steps of two documents, then six steps of four."""
    argv = flags_of_epochs(documents, tmp_path / "run", {"num_train_epochs": 1.25, "eval_every": 0, "save_every": 3})
    with noting_documents(tmp_path / "read.jsonl"):
        train_until_cut_off(alone, argv)
        train(alone, ["--resume", str(tmp_path / "run"), "--per_device_train_batch_size", "4"])
    # the cut-off step was not saved
    notes = [
        (step, indices) for _, step, indices in read_notes(tmp_path / "read.jsonl") if len(indices) == 4 or step < 3
    ]
    assert [step for step, _ in notes] == list(range(9))
    read = [index for _, indices in notes for index in indices]
    assert len(read) == 30
    # no document of the first epoch is repeated or lost; the epoch ends within the seventh step
    assert len(set(read[:22])) == 22
    assert set(read[:26]) == set(range(24))


def flags_of_epochs(documents, folder, changes):
    argv = flags(documents, folder, **changes)
    for name in ("--max_steps", "--warmup_steps"):
        place = argv.index(name)
        del argv[place : place + 2]
    return argv
