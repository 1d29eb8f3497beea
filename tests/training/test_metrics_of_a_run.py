"""Metrics of a run: each value in `metrics.jsonl` is that of the batches, the model and the documents."""

import json
import os
import socket
import time

import pytest
import torch
from transformers import AutoTokenizer

from launching import load_script
from recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.evaluation.predictions import read_predictions
from recurrent_bart.evaluation.rouge import rouge_per_sample
from recurrent_bart.model.flops import Arithmetic
from recurrent_bart.monitoring.fields import CHECKPOINTS, EVALUATIONS, SCORES, STEPS
from recurrent_bart.training import session
from recurrent_bart.training.session import Session
from recurrent_bart.training.trainer import Trainer
from runs import flags

PEAK = 1e12
N_STEPS = 6
RUN = {
    "max_steps": N_STEPS,
    "warmup_steps": 2,
    "log_every": 2,
    "eval_every": 3,
    "save_every": 1,
    "learning_rate": 0.004,
    "lr_scheduler": "linear",
    "gradient_accumulation_steps": 2,
    "max_n_segments": 2,
    "eval_documents": 5,
    "prefix_attention": "gated",
    "dropout": 0.0,
}


class Watched:
    """Records of a run, with its batches by step, its losses and the arithmetic of its model."""

    def __init__(self):
        self.batches, self.losses, self.sessions, self.seconds = {}, {}, [], 0.0

    def of(self, group):
        """Return the records of a group of fields, by step."""
        first = next(iter(group))
        return {record["step"]: record for record in self.records if first in record}

    def steps_of(self, step):
        """Return the steps of the log line that was written after a step."""
        logged = [0, *self.of(STEPS)]
        return range(logged[logged.index(step) - 1], step)

    def batches_of(self, step):
        return [batch for number in self.steps_of(step) for batch in self.batches[number]]


@pytest.fixture(scope="module")
def run(documents, tmp_path_factory):
    """Return what was watched of one run."""
    folder, watched = tmp_path_factory.mktemp("metrics") / "run", Watched()
    forward_backward, enter, before_run = Trainer.forward_backward, Session.__enter__, dict(os.environ)

    def noting(trainer, batch, n_targets):
        watched.batches.setdefault(trainer.state.step, []).append(batch)
        before = float(trainer.step_metrics.loss)
        forward_backward(trainer, batch, n_targets)
        watched.losses.setdefault(trainer.state.step, []).append(float(trainer.step_metrics.loss) - before)

    def entered(opened):
        watched.sessions.append(opened)
        return enter(opened)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "forward_backward", noting)
        patch.setattr(Session, "__enter__", entered)
        patch.setattr(session, "peak_flops", lambda device, in_bf16: PEAK)
        patch.setattr(session, "draw_curves", lambda records, path: None)
        # two documents without a target, which are skipped
        data = documents / "with-bad.jsonl"
        lines = (documents / "train.jsonl").read_text()
        data.write_text(lines + '{"sections": ["a"], "summaries": [""]}\n' * 2)
        began = time.perf_counter()
        arguments = flags(documents, folder, **RUN, train_file=data)
        assert load_script("train").main([*arguments, "--skip_bad_samples"]) == 0
        watched.seconds = time.perf_counter() - began
    os.environ.clear()
    os.environ.update(before_run)
    watched.folder = folder
    watched.records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return watched


@pytest.mark.slow
def test_lines_are_written_at_their_intervals_and_hold_every_field(run):
    assert list(run.of(STEPS)) == [2, 3, 4, 6]
    assert list(run.of(EVALUATIONS)) == [0, 3, 6]
    # one checkpoint after each step, and not two at an evaluation
    assert [record["step"] for record in run.records if "checkpoint_seconds" in record] == [1, 2, 3, 4, 5, 6]
    assert all(record.keys() == {"step", *CHECKPOINTS} for record in run.of(CHECKPOINTS).values())
    expected = {"step", *STEPS} - {"gold_probability", "curriculum_segments"}
    assert all(record.keys() == expected for record in run.of(STEPS).values())
    evaluations = [record for step, record in run.of(EVALUATIONS).items() if step]
    assert set().union(*evaluations) == {"step", *EVALUATIONS}
    # a score without a value, for example the 4-grams of texts of 3 words, is left out
    always = {"step", *EVALUATIONS} - {*SCORES} | {
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
        "n_words",
        "n_target_words",
    }
    assert all(record.keys() >= always for record in evaluations)


def test_the_loss_is_the_mean_over_the_targets_of_all_steps_of_a_line(run):
    for step, record in run.of(STEPS).items():
        losses = [loss for number in run.steps_of(step) for loss in run.losses[number]]
        n_targets = sum(int((batch.labels != -100).sum()) for batch in run.batches_of(step))
        assert record["loss"] == pytest.approx(sum(losses) / n_targets, rel=1e-4)
        # one process
        assert record["loss_max"] == pytest.approx(record["loss"], rel=1e-6)


def test_learning_rates_and_norms_are_those_of_the_last_step(run):
    # two steps of warm-up, then a line to 0 after the last step
    rates = [0.004 / 3, 0.008 / 3, 0.004, 0.003, 0.002, 0.001]
    for step, record in run.of(STEPS).items():
        assert record["learning_rate"] == pytest.approx(rates[step - 1], rel=1e-6), step
        squares = record["gradient_norm_backbone"] ** 2 + record["gradient_norm_recurrence"] ** 2
        assert squares == pytest.approx(record["gradient_norm"] ** 2, rel=1e-4)
        assert min(record["gradient_norm_backbone"], record["gradient_norm_recurrence"]) > 0
        assert record["n_skipped"] == 0


def test_speeds_are_tokens_and_work_over_the_time_of_a_line(run):
    parts = run.sessions[0].engine.module
    arithmetic = Arithmetic(parts.config, 1.0)
    for step, record in run.of(STEPS).items():
        seconds = len(run.steps_of(step)) * record["step_seconds"]
        batches = run.batches_of(step)
        n_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        assert record["tokens_per_second"] == pytest.approx(n_tokens / seconds, rel=1e-6)
        assert record["tokens_per_second_per_device"] == record["tokens_per_second"]
        n_flops = sum(arithmetic.training(batch.attention_mask, batch.labels) for batch in batches)
        assert record["model_flops_share"] == pytest.approx(n_flops / seconds / PEAK, rel=1e-6)
        left = (N_STEPS - step) * record["step_seconds"]
        assert record["seconds_left"] == pytest.approx(left, rel=1e-6)
        kinds = [record[f"{kind}_seconds"] for kind in ("data", "forward", "backward", "optimizer")]
        assert min(kinds) > 0
        assert sum(kinds) < record["step_seconds"]


def test_ranks_and_memory_are_those_of_this_process(run):
    for record in run.of(STEPS).values():
        own = record["data_seconds"] + record["forward_seconds"]
        assert record["rank_seconds"] == [pytest.approx(own)]
        for which in ("slowest", "fastest"):
            assert record[f"{which}_rank"] == 0
            assert record[f"{which}_host"] == socket.gethostname()
            assert record[f"{which}_seconds"] == record["rank_seconds"][0]
        # only a GPU has an allocator
        assert (record["memory_reserved_bytes"], record["memory_retries"]) == (0, 0)
        assert 1e8 < record["memory_allocated_bytes"] < 1e11


def test_documents_are_counted(run, documents):
    corpus = [json.loads(line) for line in (documents / "train.jsonl").read_text().splitlines()]
    plan = run.sessions[0].prepared.splits["train"].plan
    lengths = run.sessions[0].prepared.splits["train"].corpus["section_lengths"]
    # 14 of 16 tokens of a segment are text
    n_cut = sum(sum(-(-length // 14) for length in own) > 2 for own in lengths)
    assert 0 < n_cut < len(corpus) == len(plan.indices)
    for step, record in run.of(STEPS).items():
        assert (record["n_cut_documents"], record["n_bad_documents"]) == (n_cut, 2)
        batches = run.batches_of(step)
        n_segments = sum(int((batch.attention_mask.sum(dim=-1) > 0).sum()) for batch in batches)
        n_documents = sum(len(batch.indices) for batch in batches)
        assert n_documents == 4 * len(run.steps_of(step))
        assert record["segments_per_document"] == pytest.approx(n_segments / n_documents)


@torch.no_grad()
def test_an_evaluation_has_the_loss_and_rouge_of_the_saved_model(run):
    evaluations = run.of(EVALUATIONS)
    best = min(evaluations.values(), key=lambda record: record["validation_loss"])
    assert best["step"] > 0
    model = RecurrentBartForConditionalGeneration.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    split = run.sessions[0].prepared.splits["validation"]
    total, n_targets, generated, targets = 0.0, 0, [], []
    for index in split.plan.indices:
        batch = split.collator([{**split.corpus[index], "index": index}])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = model(**inputs, labels=batch.labels).logits
        total += float(torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum"))
        n_targets += batch.labels.numel()
        ids = model.generate(**inputs, max_new_tokens=8, num_beams=1)
        generated.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        targets.append(split.corpus[index]["summary_texts"][0])
    assert best["validation_loss"] == pytest.approx(total / n_targets, rel=1e-5)
    expected = {name: values.mean() for name, values in rouge_per_sample(generated, targets).items()}
    assert expected.keys() == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert {name: best[name] for name in expected} == pytest.approx(expected)
    predictions = read_predictions(run.folder / "predictions.jsonl")
    assert [(prediction.text, prediction.targets) for prediction in predictions] == [
        (text, [target]) for text, target in zip(generated, targets, strict=True)
    ]
    durations = [record["evaluation_seconds"] for record in evaluations.values()]
    durations += [record["checkpoint_seconds"] for record in run.records if "checkpoint_seconds" in record]
    assert min(durations) > 0
    assert sum(durations) < run.seconds


@torch.no_grad()
def test_an_evaluation_has_the_gates_of_the_model(run):
    record = max(run.of(EVALUATIONS).values(), key=lambda each: each["step"])
    recurrence = run.sessions[0].engine.module.model.encoder.recurrence
    gates = [float(torch.tanh(gate).abs().mean()) for gate in recurrence.prefix_gate]
    assert record["prefix_gate"] == pytest.approx(gates, rel=1e-5)
    assert max(gates) > 0
    n_layers = len(gates)
    assert len(record["update_gate"]) == n_layers
    assert all(0 < gate < 1 for gate in record["update_gate"])
    for name in ("prefix_mass", "prefix_size", "state_norm", "state_change"):
        assert [len(row) for row in record[name]] == [2] * n_layers, name
    assert len(record["gradient_by_distance"]) == 2
    assert min(record["gradient_by_distance"]) > 0
