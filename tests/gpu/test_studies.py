"""Runs of studies on a GPU: captured steps equal plain steps, and runs in parallel equal runs alone."""

import itertools
import math

import pytest
import torch

from recurrent_bart.studies.definitions import ALTERNATIVES, CONTEXTS, DEPTHS
from recurrent_bart.studies.memory.graphed_function import GraphedFunction
from recurrent_bart.studies.memory.single_run import SingleRun, execute
from recurrent_bart.studies.memory.turns import take_turns
from recurrent_bart.studies.tasks.babi import Babi, Story, Tables, Vocabulary
from study_runs import MODEL, all_turns, begun, short_run

pytestmark = pytest.mark.gpu

TASKS = {
    "recall": {"task": {"name": "recall", "n_symbols": 4, "n_marked": 1}},
    "retrieval": {"task": {"name": "retrieval", "n_symbols": 4, "n_pairs": 2, "n_queries": 1}},
    "bfloat16": {"bf16": True},
}


@pytest.fixture
def device():
    """Return the GPU, with a stream that is not the default one, as runs in turns have it."""
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield device


def twenty_steps(**changes):
    # each evaluation ends a stage, so new lengths appear and old ones return
    fields = {"stages": (1, 2, 3), "threshold": 0.0, "max_steps": 20, "eval_every": 5, "segment_size": 8}
    model = {"model": MODEL | changes.pop("model", {})}
    return short_run(**fields | model | changes)


@pytest.mark.parametrize("changes", [*(ALTERNATIVES | DEPTHS | CONTEXTS | TASKS).values()])
def test_recorded_steps_and_evaluations_are_the_steps_and_evaluations_themselves(changes, device):
    recorded, plain = (SingleRun(twenty_steps(**changes), device) for _ in range(2))
    plain.update, plain.predict = plain._update, plain._predict
    for single in (recorded, plain):
        assert all_turns(single.train()) == "steps"
    n_recorded = [sum(map(bool, work.captured.values())) for work in (recorded.update, recorded.predict)]
    # steps of 1, 2 and 3 segments; among evaluations, only lengths of 3 segments return
    assert n_recorded == [3, 1]
    assert [point["n_segments"] for point in recorded.curve] == [1, 2, 3, 3]
    rounding = 2e-2 if recorded.run.bf16 else 1e-3
    for one, other in zip(recorded.curve, plain.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rounding)
        # of a hundred answers, a few are close to the decision boundary
        assert one["token_accuracy"] == pytest.approx(other["token_accuracy"], abs=0.1)


def test_after_its_first_call_with_a_shape_a_step_waits_for_nothing(device):
    single = SingleRun(twenty_steps(), device)
    single.stage = 2
    for n_segments in (1, 2, 3) * 2:
        single.update(*single.documents.batch(n_segments))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            single.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(file):
    return [point["loss"] for point in file.read()["curve"]]


def test_runs_beside_each_other_are_what_each_is_alone(tmp_path, device):
    runs = [twenty_steps(seed=0), twenty_steps(seed=1), twenty_steps(model={"recurrence": "top"}, name="top")]
    alone, together = (begun(tmp_path / name, *runs) for name in ("alone", "together"))
    found = {}
    for files, n_at_once in ((alone, 1), (together, 3)):
        ended = list(take_turns(files, lambda file: execute(file, device, math.inf), n_at_once, device))
        assert {file for file, error in ended if error is None} == set(files)
        found[n_at_once] = [losses(file) for file in files]
    for one, other in zip(found[1], found[3], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert all(file.read()["peak_bytes"] > 0 for file in together)


def test_a_run_that_is_out_of_memory_while_it_is_recorded_fails_alone(tmp_path, device):
    (file,) = begun(tmp_path / "good", twenty_steps())

    def begin(item):
        if item == "good":
            yield from execute(file, device, math.inf)
            return
        sizes = iter((1, 2**46))
        greedy = GraphedFunction(
            lambda tensor: tensor + torch.empty(next(sizes), device=device)[0], torch.cuda.graph_pool_handle()
        )
        for _ in range(2):
            greedy(torch.ones(3, device=device))
            yield

    ended = list(take_turns(["bad", "good", "bad"], begin, 2, device))
    assert [item for item, error in ended if error is None] == ["good"]
    assert all("out of memory" in error for item, error in ended if item == "bad")
    assert file.read()["stopped"] == "steps"


def test_a_run_that_has_ended_leaves_its_memory(tmp_path, device):
    files = begun(tmp_path / "runs", *(twenty_steps(seed=seed) for seed in range(3)))
    turns = take_turns(files, lambda file: execute(file, device, math.inf), 1, device)
    left = [torch.cuda.memory_allocated() for _, error in turns if error is None]
    assert len(left) == 3
    assert max(left) - min(left) < 2**20


def test_babis_documents_are_put_together_on_it(device):
    stories = [
        Story([["a", "b"], ["c"]], ["where", "?"], ["a"]),
        Story([["d"]], ["who", "is", "it", "?"], ["b", "c"]),
    ]
    sentences = [["one", "two", "."], ["three", "."]] * 20
    needed = itertools.chain.from_iterable([*itertools.chain(*it.facts), *it.question, *it.answer] for it in stories)
    vocabulary = Vocabulary(needed, sentences, 100)
    task = Babi(Tables.build(stories, sentences, vocabulary), vocabulary)
    words = {number: word for word, number in vocabulary.ids.items()}
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(2):
        # the second call finds its tables on the GPU
        input_ids, labels = task.batch(generator, 32, 3, 8)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert input_ids.is_cuda
    assert labels.is_cuda
    ends = set()
    for row in input_ids.flatten(1).tolist():
        text = " ".join(words[number] for number in row)
        ends.add(text.endswith("where ?"))
        assert text.index("a b") < text.index(" c ") if text.endswith("where ?") else text.endswith("who is it ?")
    assert ends == {True, False}
