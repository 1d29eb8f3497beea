"""A single run learns its task, follows from its seed, and saves its results."""

import json
import math
import time

import pytest
import torch

from recurrent_bart.studies.memory.single_run import SingleRun, execute
from recurrent_bart.studies.study_run import RunFile
from recurrent_bart.studies.tasks.memory_tasks import score
from study_runs import MODEL, all_turns, short_run

CPU = torch.device("cpu")
LONG = {"max_steps": 1500, "eval_every": 50, "warmup_steps": 20, "stage_steps": 0}


def trained(**changes):
    single = SingleRun(short_run(**changes), CPU)
    single.stopped = all_turns(single.train())
    return single


@pytest.mark.slow
def test_a_state_carries_what_the_last_segment_does_not_say():
    single = trained(**LONG)
    assert single.stopped == "learnt"
    assert single.step < LONG["max_steps"]
    assert [point["n_segments"] for point in single.curve[-3:]] == [2, 2, 2]
    assert all_turns(single.accuracy(2)).exact_match > 0.99
    assert single.result()["steps_to_reach"] <= single.step - 100
    # without state, the same steps learn documents of one segment alone
    fields = LONG | {"max_steps": single.step, "stage_steps": 100}
    blind = trained(model=MODEL | {"pre_seq_len": 0}, window="last", **fields)
    assert blind.stopped == "steps"
    assert all_turns(blind.accuracy(1)).exact_match > 0.99
    assert all_turns(blind.accuracy(2)).exact_match < 0.5
    assert blind.result()["steps_to_reach"] is None


def test_a_run_follows_from_its_seed():
    losses = [point["loss"] for point in trained().curve]
    assert losses == [point["loss"] for point in trained().curve]
    assert losses != [point["loss"] for point in trained(seed=1).curve]


def test_its_steps_are_those_of_a_plain_loop():
    changes = {"stages": (2,), "max_grad_norm": 0.1, "weight_decay": 0.0, "adam_beta2": 0.9}
    single, plain = (SingleRun(short_run(**changes), CPU) for _ in range(2))
    all_turns(single.train())
    optimizer = torch.optim.AdamW(plain.model.parameters(), betas=(0.9, 0.9), weight_decay=0.0)
    losses = []
    # warm-up over two steps, then decay to 0 at step 6
    for step, share in enumerate((1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4)):
        optimizer.param_groups[0]["lr"] = 3e-3 * share
        input_ids, labels = plain.documents.batch(plain.curriculum.draw(0, step))
        loss = plain.model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    pairs = [sum(losses[start : start + 2]) / 2 for start in (0, 2, 4)]
    assert [point["loss"] for point in single.curve] == pytest.approx(pairs, rel=1e-5)
    for one, other in zip(single.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_turn_is_a_step_or_a_pass_of_an_evaluation(monkeypatch):
    monkeypatch.setattr("recurrent_bart.studies.tasks.drawn_documents.TEST_PASS", 16)
    single = SingleRun(short_run(stages=(2,)), CPU)
    turns = single.train()
    steps = []
    for _ in turns:
        steps.append(single.step)
    # 32 documents of 2 segments are 4 passes
    assert steps == [1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 5, 6, 6, 6, 6, 6]


def test_evaluating_does_not_change_what_is_trained():
    often, seldom = trained(eval_every=1, stages=(2,)), trained(eval_every=6, stages=(2,))
    for one, other in zip(often.model.parameters(), seldom.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_runs_are_tested_on_the_same_documents_whatever_their_seed():
    seen = []
    for seed in (0, 1):
        single = SingleRun(short_run(seed=seed), CPU)
        forward = single._forward
        single._forward = lambda ids, labels, forward=forward: (seen.append(ids), forward(ids, labels))[1]
        all_turns(single.accuracy(2))
    assert torch.equal(*seen)


def test_accuracy_is_of_all_documents_in_passes_of_any_size(monkeypatch):
    single = SingleRun(short_run(), CPU)
    monkeypatch.setattr("recurrent_bart.studies.tasks.drawn_documents.TEST_PASS", 10)
    passes = []
    forward = single._forward
    single._forward = lambda ids, labels: (passes.append((ids, labels)), forward(ids, labels))[1]
    found = all_turns(single.accuracy(2))
    assert [len(ids) for ids, _ in passes] == [5] * 6 + [2]
    ids, labels = (torch.cat(parts) for parts in zip(*passes, strict=True))
    with torch.no_grad():
        single.model.eval()
        assert found == score(single.model(input_ids=ids, labels=labels).logits.argmax(-1), labels)


@pytest.mark.parametrize(("window", "shape"), [("segments", (3, 4)), ("all", (1, 12)), ("last", (1, 4))])
def test_a_window_is_what_the_model_reads_at_once(window, shape, monkeypatch):
    single = SingleRun(short_run(window=window, model=MODEL | {"pre_seq_len": 0}), CPU)
    ids, labels = single.documents.task.batch(torch.Generator(), 2, 3, 4)
    read = []
    monkeypatch.setattr(single, "model", lambda input_ids, labels: read.append(input_ids))
    single._forward(ids, labels)
    assert read[0].shape == (2, *shape)
    assert torch.equal(read[0].flatten(), (ids[:, -1:] if window == "last" else ids).flatten())


def test_stages_end_by_accuracy_or_by_steps():
    by_steps = trained(threshold=2.0, stage_steps=4)
    assert [point["n_segments"] for point in by_steps.curve] == [1, 1, 2]
    assert [point["n_segments"] for point in trained(threshold=0.0, stage_steps=0).curve] == [1, 2, 2]


def test_easier_stages_come_first_with_documents_of_their_own():
    easier = ({"segment_size": 2}, {"segment_size": 3})
    single = SingleRun(short_run(easier=easier, threshold=2.0, stage_steps=2, max_steps=8), CPU)
    shapes, update = [], single.update
    single.update = lambda ids, labels: (shapes.append(tuple(ids.shape[1:])), update(ids, labels))[1]
    all_turns(single.train())
    assert [length for _, length in shapes] == [2, 2, 3, 3, 4, 4, 4, 4]
    assert [point["n_segments"] for point in single.curve] == [1, 1, 1, 2]
    assert [point["stage"] for point in single.curve] == [0, 1, 2, 3]


@pytest.mark.slow
def test_easier_stages_may_have_several_segments():
    easier = ({"segment_size": 2}, {"segment_size": 2, "n_segments": 2})
    single = SingleRun(short_run(easier=easier, stages=(3,), threshold=2.0, stage_steps=20, max_steps=60), CPU)
    shapes, update = [], single.update
    single.update = lambda ids, labels: (shapes.append(tuple(ids.shape[1:])), update(ids, labels))[1]
    all_turns(single.train())
    assert [set(shapes[start : start + 20]) for start in (0, 20, 40)] == [
        {(1, 2)},
        {(1, 2), (2, 2)},
        {(1, 4), (2, 4), (3, 4)},
    ]


ENCODER = "model.encoder.layers.0.fc1.weight"
RETRIEVAL = {
    "task": {"name": "retrieval", "n_pairs": 1, "n_queries": 1, "n_symbols": 8, "n_fillers": 4},
    "encoder_loss": 0.5,
}


def test_the_encoder_is_asked_where_the_question_stands():
    single = SingleRun(short_run(**RETRIEVAL), CPU)
    ids, labels = single.documents.batch(2)
    output = single._forward(ids, labels)
    # the document ends with a mark and the key
    said = single.model.lm_head(output.encoder_last_hidden_state[:, -1])
    expected = torch.nn.functional.cross_entropy(said, labels[:, 0])
    found = single._encoder_loss(output.encoder_last_hidden_state, labels)
    torch.testing.assert_close(found, expected)


def test_its_loss_is_trained_by_its_weight_but_not_reported():
    def step(encoder_loss):
        single = SingleRun(short_run(**RETRIEVAL | {"encoder_loss": encoder_loss, "max_grad_norm": 1e9}), CPU)
        gradients = {}
        single.optimizer.step = lambda: gradients.update({n: p.grad for n, p in single.model.named_parameters()})
        return float(single._update(*single.documents.batch(2))), gradients

    (loss, without), (same, half), (_, whole) = (step(weight) for weight in (0.0, 0.5, 1.0))
    assert loss == same
    for name, gradient in without.items():
        torch.testing.assert_close(half[name] - gradient, (whole[name] - gradient) / 2, rtol=1e-3, atol=1e-6)
    assert (half[ENCODER] - without[ENCODER]).norm() > 0.01 * without[ENCODER].norm()


def test_tasks_without_a_place_to_ask_at_have_no_loss_of_the_encoder():
    with pytest.raises(ValueError, match=r"encoder_loss=1\.0: must be 0 for the task copy"):
        SingleRun(short_run(encoder_loss=1.0), CPU)


def test_a_loss_that_is_not_finite_ends_it():
    assert trained(learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30, max_steps=50).stopped == "diverged"


def test_when_the_time_is_over_it_keeps_what_there_is(tmp_path):
    file = RunFile(tmp_path / "run.json")
    run = short_run()
    file.begin(run)
    all_turns(execute(file, CPU, deadline=0.0))
    record = file.read()
    assert (record["stopped"], record["steps"]) == ("budget", 1)
    assert set(record["accuracy"]) == {"1", "2", "4"}
    # a run cut off by its budget is unfinished
    assert not file.is_finished(run)


def test_time_is_left_for_the_tests(monkeypatch):
    single = SingleRun(short_run(test_segments=(1, 2, 4)), CPU)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    single.began = 0.0
    assert not single.is_over(1000.0)
    assert single.is_over(999.0)
    # Evaluations took 2 s per segment. Tests (7 segments) and last evaluation (2 * 2) have 11 segments; SPARE is 2.
    single.evaluation_seconds, single.n_evaluated_segments = 6.0, 3
    assert not single.is_over(1044.0)
    assert single.is_over(1043.0)
    # the reserve is at most half of the run's time
    single.began = 960.0
    assert not single.is_over(1020.0)
    assert single.is_over(1019.0)


def test_evaluations_are_timed():
    single = SingleRun(short_run(), CPU)
    started = time.perf_counter()
    all_turns(single.tested())
    assert 0 < single.evaluation_seconds < time.perf_counter() - started
    assert single.n_evaluated_segments == 7


def test_the_file_tells_the_run_what_came_of_it_and_where(tmp_path):
    file = RunFile(tmp_path / "run.json")
    run = short_run()
    file.begin(run)
    assert not file.is_finished(run)
    all_turns(execute(file, CPU, math.inf))
    record = json.loads(file.path.read_text())
    assert (record["stopped"], record["steps"], record["device"]) == ("steps", 6, "cpu")
    assert [point["step"] for point in record["curve"]] == [2, 4, 6]
    assert 0 <= record["accuracy"]["4"]["exact_match"] <= 1
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["n_parameters"] == sum(p.numel() for p in SingleRun(run, CPU).model.parameters())
    assert file.is_finished(run)
    assert not file.is_finished(short_run(max_steps=7))


def test_a_run_that_is_killed_leaves_its_curve(tmp_path, monkeypatch):
    file = RunFile(tmp_path / "run.json")
    file.begin(short_run())
    monkeypatch.setattr(SingleRun, "is_learnt", lambda self: 1 / 0 if self.step == 4 else False)
    with pytest.raises(ZeroDivisionError):
        all_turns(execute(file, CPU, math.inf))
    assert [point["step"] for point in file.read()["curve"]] == [2, 4]
    assert not file.is_finished(short_run())


def test_steps_that_took_next_to_no_time_still_have_a_speed():
    single = SingleRun(short_run(), CPU)
    single.seconds = 0.004
    assert single.result()["seconds"] == 0.004
