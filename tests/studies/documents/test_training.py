"""A run on documents trains like launch/train.py, ends by the clock, and leaves comparable results."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import BartConfig, BartForConditionalGeneration

from recurrent_bart.data.batches import Collator, SegmentSizes, plan_documents
from recurrent_bart.evaluation.evaluator import Evaluator
from recurrent_bart.evaluation.rouge import rouge_per_sample
from recurrent_bart.studies.documents.text_run import TextRun
from recurrent_bart.studies.documents.training import (
    TextTraining,
    execute_text,
    list_targets,
    next_evaluation,
    prepare_documents,
)
from recurrent_bart.studies.study_run import RunFile
from runs import flags

CPU = torch.device("cpu")


@pytest.fixture
def make_run(documents):
    """Return a function that builds a run of few steps; it takes further flags."""

    def make(reads="segments", seconds=None, model="recurrent", **changes):
        words = flags(documents, "", **{"max_n_segments": 4} | changes)
        named = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
        kept = {name: value for name, value in named.items() if name != "output_dir"}
        return TextRun("layerwise", "papers", kept, seed=5, reads=reads, seconds=seconds, model=model)

    return make


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("task", "precision", "n_passes"),
    [("document", "fp32", 1), ("sections", "fp32", 1), ("sections", "bf16", 1), ("sections", "bf16", 4)],
)
def test_losses_are_those_of_launch_train(make_run, documents, tmp_path, train_main, task, precision, n_passes):
    same = {"task": task, "precision": precision, "max_steps": 3, "eval_every": 3, "lr_scheduler": "constant"}
    same |= {"gradient_accumulation_steps": n_passes}
    same |= {"bptt_depth": -1, "max_n_segments": 4, "dropout": 0.0, "hidden_dropout_prob": 0.0}
    assert train_main(flags(documents, tmp_path / "run", seed=5, **same)) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = TextTraining(make_run(**same | {"eval_every": 1}), CPU)
    training.train()
    losses = [point["loss"] for point in training.curve]
    expected = [record["loss"] for record in records if "loss" in record]
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-6)
    # after two steps, a weight near the middle of two bf16 numbers may round to either
    closeness = {"fp32": 1e-5, "bf16": 1e-3}[precision]
    assert losses == pytest.approx(expected, rel=closeness)
    evaluated = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert training.curve[-1]["validation_loss"] == pytest.approx(evaluated[-1], rel=closeness)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reads", "task", "changes"),
    [
        ("segments", "sections", {}),
        ("segments", "sections", {"recurrence": "none"}),
        ("heads", "sections", {"pre_seq_len": 0}),
        ("heads", "document", {"pre_seq_len": 0}),
        ("whole", "document", {"model": "led"}),
        ("whole", "document", {"model": "led", "precision": "bf16"}),
        ("whole", "document", {"pre_seq_len": 0}),
        ("segments", "document", {"pre_seq_len": 0, "decoder_context": "all"}),
        ("segments", "document", {"pre_seq_len": 0, "decoder_context": "all", "model": "numbered"}),
        ("segments", "sections", {"precision": "bf16", "schedule": "wavefront"}),
    ],
)
def test_every_model_leaves_losses_and_texts_of_the_same_targets(make_run, tmp_path, reads, task, changes):
    file, run = RunFile(tmp_path / "run.json"), make_run(reads, task=task, max_steps=2, eval_every=1, **changes)
    file.begin(run)
    execute_text(file, CPU, math.inf)
    record = file.read()
    assert (record["stopped"], file.is_finished(run), record["device"], record["precision"]) == (
        *("steps", True, "cpu"),
        changes.get("precision", "fp32"),
    )
    assert [point["step"] for point in record["curve"]] == [1, 2]
    one_each = make_run(task=task)
    assert record["targets"] == TextTraining(one_each, CPU).targets
    for point in record["curve"]:
        assert len(point["target_losses"]) == len(record["targets"])
        n_tokens = sum(target["n_tokens"] for target in record["targets"])
        assert point["validation_loss"] == pytest.approx(sum(point["target_losses"]) / n_tokens)
    told = [(text["document"], text["target"]) for text in record["texts"]]
    assert told == [(t["document"], t["target"]) for t in record["targets"][: len(told)]]
    assert len({document for document, _ in told}) == 3


def test_targets_say_where_they_stand(make_run, documents):
    training = TextTraining(make_run(task="sections", segment_size=64), CPU)
    lines = (documents / "validation.jsonl").read_text().splitlines()
    assert {target["document"] for target in training.targets} == {json.loads(line)["id"] for line in lines}
    row = training.evaluator.corpus[0]
    own = [target for target in training.targets if target["document"] == row["id"]]
    lengths = row["section_lengths"]
    assert [target["position"] for target in own] == [sum(lengths[: n + 1]) for n in range(len(lengths))]
    # two special tokens, at most 8 tokens in all
    assert [target["n_tokens"] for target in own] == [min(8, length + 2) for length in row["summary_lengths"]]


def test_texts_are_scored_against_their_targets_by_the_best_weights(make_run):
    training = TextTraining(make_run(max_steps=2, eval_every=1), CPU)
    training.train()
    best = {name: value.clone() for name, value in training.best.items()}
    with torch.no_grad():
        for parameter in training.reader.model.parameters():
            parameter.zero_()
    texts = training.texts()
    assert all(value.equal(best[name]) for name, value in training.reader.model.state_dict().items())
    target = {row["id"]: row["summary_texts"][0] for row in training.evaluator.corpus}
    for text in texts:
        expected = rouge_per_sample([text["generated"]], [target[text["document"]]])
        assert text["rouge1"] == pytest.approx(expected["rouge1"][0])


def test_the_weights_of_the_lowest_loss_are_kept(make_run, monkeypatch):
    training = TextTraining(make_run(), CPU)
    losses = iter([3.0, 1.0, 2.0])
    n_targets = len(training.targets)
    monkeypatch.setattr(training.evaluator, "target_losses", lambda _: {0: [next(losses)] * n_targets})
    kept = []
    for _ in range(3):
        training.train_step()
        training.validate()
        kept.append({name: value.clone() for name, value in training.best.items()})
    differs = [any(not now[name].equal(then[name]) for name in now) for then, now in itertools.pairwise(kept)]
    assert differs == [True, False]


def test_evaluations_come_at_the_same_steps_in_every_run():
    steps, step = [], 0
    while step < 300:
        step = next_evaluation(step, 100)
        steps.append(step)
    assert steps == [100, 125, 156, 195, 244, 305]
    # the result does not depend on earlier calls
    assert [next_evaluation(step, 100) for step in (1, 99, 100, 124, 125, 126)] == [100, 100, 125, 125, 156, 156]
    assert next_evaluation(1, 1) == 2


def test_a_run_ends_when_its_training_time_is_over(make_run, monkeypatch):
    """Exclude evaluations, which take 100 s each, from the training time."""
    training, clock = TextTraining(make_run(seconds=10.0, max_steps=100, eval_every=4), CPU), [0.0]
    monkeypatch.setattr("recurrent_bart.studies.documents.training.time.perf_counter", lambda: clock[0])
    step, target_losses = training.engine.step, training.evaluator.target_losses

    def slow_step():
        clock[0] += 1.5
        step()

    def slow_losses(losses):
        clock[0] += 100.0
        return target_losses(losses)

    monkeypatch.setattr(training.engine, "step", slow_step)
    monkeypatch.setattr(training.evaluator, "target_losses", slow_losses)
    training.train()
    assert training.ended == "time"
    assert [(point["step"], point["seconds"]) for point in training.curve] == [(4, 6.0), (5, 7.5), (6, 9.0), (7, 10.5)]


def test_out_of_its_budget_it_stops_with_what_there_is(make_run):
    training, evaluated = TextTraining(make_run(max_steps=100, eval_every=50), CPU, budget_seconds=0.0), []
    training.on_save = lambda metrics: evaluated.append(len(training.curve))
    training.train()
    assert ([point["step"] for point in training.curve], evaluated, training.ended) == ([1], [1], "budget")


def test_a_budget_that_ends_in_an_evaluation_allows_no_other_step(make_run, monkeypatch):
    training = TextTraining(make_run(max_steps=100, eval_every=1), CPU)
    target_losses = training.evaluator.target_losses

    def until_the_deadline(losses):
        training.deadline = 0.0
        return target_losses(losses)

    monkeypatch.setattr(training.evaluator, "target_losses", until_the_deadline)
    training.train()
    assert ([point["step"] for point in training.curve], training.ended) == ([1], "budget")


def test_it_stops_where_the_loss_is_no_number(make_run):
    training = TextTraining(make_run(max_steps=100, eval_every=1, learning_rate=1e30, warmup_steps=0), CPU)
    training.train()
    assert training.ended == "diverged"
    assert training.state.step < 100


def test_accumulated_batches_make_the_step_of_one(make_run):
    """Compare one batch of four documents with two batches of two: every target has the same weight."""
    same = {"dropout": 0.0, "hidden_dropout_prob": 0.0, "max_steps": 2, "eval_every": 1}
    whole = TextTraining(make_run(per_device_train_batch_size=4, **same), CPU)
    parts = TextTraining(make_run(gradient_accumulation_steps=2, **same), CPU)
    for training in (whole, parts):
        training.train()
    losses, n_tokens = ([[p[key] for p in each.curve] for each in (whole, parts)] for key in ("loss", "n_tokens"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert n_tokens[0] == n_tokens[1]


def test_targets_of_one_record_are_of_one_document():
    """List targets in the order of the corpus; the plan leaves out the second row."""
    parts = {"sections": [[5] * 3, [5] * 4], "summaries": [[6] * 2, [6]], "summary_texts": ["x", "y"]}
    rows = [
        {"id": name, "record_id": name, "digest": f"text {number}", **parts}
        for number, name in enumerate(("a", "b", "a"))
    ]
    sizes = SegmentSizes(8, 8, -1)
    plan = plan_documents([[3, 4]] * 3, [[2, 1]] * 3, sizes, 2)
    collator = Collator("sections", sizes, [0], [2], 1, 12)
    evaluator = Evaluator(Dataset.from_list(rows), replace(plan, indices=[0, 2]), collator, None, 1, CPU)
    found = [(target["document"], target["target"]) for target in list_targets(evaluator)]
    assert found == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    found = [(target["document"], target["target"]) for target in list_targets(replace(evaluator, plan=plan))]
    assert found == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]


def test_targets_are_listed_with_position_and_length_without_those_of_empty_and_cut_sections():
    sections, summaries = [[5] * 3, [], [5] * 4, [5] * 5, [5] * 9], [[6] * 2, [6], [], [6] * 3, [6] * 4]
    row = {"id": "a", "record_id": "a", "digest": "", "sections": sections, "summaries": summaries}
    row["summary_texts"] = ["x"] * 5
    # a segment has room for 4 tokens of one section, so the limit of 4 segments cuts the last section
    sizes = SegmentSizes(6, 6, 4)
    lengths = ([len(part) for part in parts] for parts in (sections, summaries))
    plan = plan_documents(*([one] for one in lengths), sizes, 2)
    collator = Collator("sections", sizes, [0], [2], 1, 12)
    evaluator = Evaluator(Dataset.from_list([row]), plan, collator, None, 1, CPU)
    found = [(target["target"], target["position"], target["n_tokens"]) for target in list_targets(evaluator)]
    assert found == [(0, 3, 4), (1, 12, 5)]


def test_documents_are_made_ready_once(make_run, documents, tmp_path, monkeypatch):
    run = make_run(cache_dir=tmp_path / "cache")
    prepare_documents(run)
    made = sorted((tmp_path / "cache").rglob("*"))
    assert made
    monkeypatch.setattr("recurrent_bart.data.corpus.write_corpus", pytest.fail)
    monkeypatch.setattr("recurrent_bart.training.preparation.train_tokenizer", pytest.fail)
    TextTraining(run, CPU)
    assert sorted((tmp_path / "cache").rglob("*")) == made


def test_a_reading_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="reads='tail': allowed are 'segments', 'heads', 'whole'"):
        TextRun("a", "papers", reads="tail")


@pytest.fixture(scope="module")
def pretrained(documents, tmp_path_factory):
    """Return the folder of a plain BART with a tokenizer of the documents."""
    folder = tmp_path_factory.mktemp("bart")
    words = flags(documents, "", max_n_segments=4)
    named = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    kept = {name: value for name, value in named.items() if name != "output_dir"}
    training = TextTraining(TextRun("plain", "papers", kept | {"pre_seq_len": 0}), CPU)
    training.evaluator.tokenizer.save_pretrained(folder)
    config = training.reader.model.config
    fields = ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    shared = {name: getattr(config, name) for name in (*fields, "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size")}
    ids = {name: getattr(config, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    torch.manual_seed(0)
    start = {"decoder_start_token_id": config.decoder_start_token_id}
    BartForConditionalGeneration(BartConfig(**shared, **ids, **start, init_std=0.1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("reads", "model", "changes"),
    [
        pytest.param("heads", "recurrent", {"pre_seq_len": 0}, marks=pytest.mark.slow),
        ("whole", "recurrent", {"pre_seq_len": 0}),
        ("whole", "led", {}),
        pytest.param("segments", "recurrent", {"pre_seq_len": 0, "decoder_context": "all"}, marks=pytest.mark.slow),
        ("segments", "numbered", {"pre_seq_len": 0, "decoder_context": "all"}),
    ],
)
def test_pretrained_models_begin_with_barts_loss_on_a_document_of_one_segment(
    make_run, pretrained, reads, model, changes
):
    """Check that conversion keeps the weights: the first losses of short documents equal BART's."""
    plain = BartForConditionalGeneration.from_pretrained(pretrained).eval()
    same = {"model_name_or_path": str(pretrained), "segment_size": 64, "max_n_segments": 2}
    training = TextTraining(make_run(reads, model=model, **same, **changes), CPU)
    training.reader.model.eval()
    row = {**training.evaluator.corpus[0], "index": 0}
    row["sections"] = [row["sections"][0][:20]]
    batch = training.evaluator.collator([row])
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids[:, 0], labels=batch.labels.view(1, -1)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(training.reader.target_losses(batch).sum(), expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_state_is_also_scored_with_foreign_states(make_run):
    training = TextTraining(make_run(max_steps=2, eval_every=1), CPU)
    training.train()
    losses = training.foreign_state_losses()
    assert len(losses) == len(training.targets)
    own = min(training.curve, key=lambda point: point["validation_loss"])["target_losses"]
    assert losses != own
    # a document of one segment reads no state of another document
    n_segments = training.evaluator.plan.n_segments
    assert [a for a, n in zip(losses, n_segments, strict=True) if n == 1] == pytest.approx(
        [a for a, n in zip(own, n_segments, strict=True) if n == 1], abs=1e-3
    )
    for changes in ({"pre_seq_len": 0}, {"task": "sections"}):
        other = TextTraining(make_run(max_steps=2, eval_every=1, **changes), CPU)
        assert other.foreign_state_losses() is None


@pytest.mark.parametrize(
    ("changes", "reads_all", "may_plan"),
    [
        ({"pre_seq_len": 0, "decoder_context": "all"}, True, False),
        ({"recurrence": "none", "decoder_context": "section", "task": "sections"}, True, False),
        ({"pre_seq_len": 0, "decoder_context": "last"}, False, False),
        ({"decoder_context": "last"}, True, True),
    ],
)
def test_a_model_reads_every_segment_that_its_decoder_or_state_needs(make_run, changes, reads_all, may_plan):
    training = TextTraining(make_run(**changes), CPU)
    batch = next(training.batches)
    assert batch.input_ids.shape[1] > 1
    assert (training.reader.needed(batch) is batch) == reads_all
    assert training.reader.may_plan == may_plan


def test_no_foreign_states_with_fewer_documents_than_segments(make_run):
    training = TextTraining(make_run(max_steps=2, eval_every=1), CPU)
    training.train()
    assert training.foreign_state_losses() is not None
    training.evaluator.plan.indices[1:] = []
    assert training.foreign_state_losses() is None
