"""Metrics of a case measure the work that it names."""

import pytest
import torch

from recurrent_bart.benchmarks.models import measure as module
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting, build_benchmark_model
from recurrent_bart.benchmarks.models.cases import MODELS, Case
from recurrent_bart.benchmarks.models.generation import NEW_TOKENS
from recurrent_bart.benchmarks.models.measure import (
    OUT_OF_MEMORY,
    Measurement,
    matrix_peak,
    measure,
    random_batch,
    work_of,
)
from recurrent_bart.execution import wavefront

SETTING = BenchmarkSetting("tiny", 16, torch.device("cpu"), torch.float32)


def measured(case, n_passes=0):
    found = Measurement(matrix_peak=1e9)
    measure(case, SETTING, found, n_warmup=1, n_passes=n_passes)
    return found


def passes(task, bptt_depth, grain, n_segments, schedule="sequential"):
    return Case("ours", n_segments, "passes", 1, task, bptt_depth, grain, schedule)


def step_bytes(task, bptt_depth, grain, numbers):
    return [measured(passes(task, bptt_depth, grain, n)).step_bytes for n in numbers]


@pytest.mark.slow
def test_memory_of_windows_does_not_grow_with_the_document():
    """Allow for ids and labels of the additional segments, and for a single target their embeddings."""
    few, many = step_bytes("sections", 0, "none", (2, 6))
    assert many - few < 4 * (16 + 64) * 8 * 4
    few, many = step_bytes("document", 0, "none", (2, 6))
    assert many - few <= 4 * 16 * 128 * 4 * 2


@pytest.mark.slow
def test_memory_of_full_backpropagation_grows_less_with_checkpointing():
    growth = {}
    for grain in ("none", "layer", "segment"):
        few, many = step_bytes("document", -1, grain, (16, 48))
        growth[grain] = many - few
    assert growth["none"] > 3 * growth["layer"] > 3 * growth["segment"] > 0


def test_a_step_is_timed_without_what_was_queued_before_it(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append("waited"))
    monkeypatch.setattr(module.time, "perf_counter", lambda: seen.append("clock") or float(len(seen)))
    assert module.timed(lambda: seen.append("step"), torch.device("cuda")) == 3
    assert seen == ["waited", "clock", "step", "waited", "clock"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_figures_of_every_model_belong_together(model):
    found = measured(Case(model, 3, batch_size=2), n_passes=2)
    n_weights = sum(p.numel() for p in build_benchmark_model(Case(model, 3), SETTING).model.parameters())
    assert found.outcome == "measured"
    assert found.n_tokens == 2 * 3 * 16
    assert found.tokens_per_second() == pytest.approx(2 * 3 * 16 / found.seconds())
    assert len(found.step_seconds) == 2
    assert found.spread() >= 1
    # weights and two moments, plus one step count per weight tensor
    assert 3 * 4 * n_weights <= found.resident_bytes < 3.001 * 4 * n_weights
    # every step allocates gradients
    assert found.step_bytes > 4 * n_weights
    assert found.peak_bytes() == found.resident_bytes + found.step_bytes
    assert found.share_of_peak() == pytest.approx(found.flops / found.seconds() / 1e9)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_readers_have_neither_graph_nor_optimizer(model):
    found = measured(Case(model, 3, "inference"), n_passes=1)
    subject = build_benchmark_model(Case(model, 3, "inference"), SETTING)
    assert not subject.model.training
    assert found.resident_bytes == sum(p.numel() for p in subject.model.parameters()) * 4
    assert 0 < found.flops < measured(Case(model, 3)).flops / 3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ours", "bart"])
def test_texts_have_the_length_that_is_counted_and_what_is_read_is_not_read_again(model, monkeypatch):
    case = Case(model, 1, "generation", batch_size=3)
    found = measured(case, n_passes=1)
    assert found.n_tokens == 3 * NEW_TOKENS
    assert found.tokens_per_second() == pytest.approx(3 * NEW_TOKENS / found.seconds())
    subject = build_benchmark_model(case, SETTING)
    assert not subject.model.training
    # this bias would end every text at once
    subject.model.final_logits_bias[0, subject.model.config.eos_token_id] = 1e4
    generate = work_of(case, subject, random_batch(case, SETTING), SETTING)
    reads, contexts = [], []
    subject.model.get_encoder().register_forward_hook(lambda *_: reads.append(1))
    attention = subject.model.model.decoder.layers[0].encoder_attn
    attention.k_proj.register_forward_hook(lambda module, args, output: contexts.append(tuple(output.shape[:2])))
    for _ in range(2):
        assert generate().shape == (3, 1 + NEW_TOKENS)
    assert not reads
    # equal for both models
    assert contexts == [(3, 20 + 16)] * 2


@pytest.mark.slow
def test_a_text_costs_what_its_decoder_pass_does():
    one, many = (measured(Case("ours", 1, "generation", batch_size=n)).flops for n in (1, 4))
    assert many == pytest.approx(4 * one)
    assert one == measured(Case("bart", 1, "generation")).flops
    case = Case("bart", 1, "inference")
    batch, subject = random_batch(case, SETTING), build_benchmark_model(case, SETTING)
    decoder = subject.training_flops(batch) / 3 - subject.encoder_flops(batch)
    # the context of plain BART has no state
    assert decoder < one < 1.3 * decoder


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_changes_weights_under_dropout(model):
    case = Case(model, 2, checkpointing="layer")
    subject, batch = build_benchmark_model(case, SETTING), random_batch(case, SETTING)
    before = [parameter.detach().clone() for parameter in subject.model.parameters()]
    step = work_of(case, subject, batch, SETTING)
    losses = [sum(float(loss.detach()) for loss in subject.losses(batch)) for _ in range(2)]
    assert losses[0] != losses[1]
    step()
    changed = [bool((old != new).any()) for old, new in zip(before, subject.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.grad is None for parameter in subject.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rmt", "segenc", "bart", "led", "longt5"])
def test_other_models_keep_less_when_layers_are_recomputed(model):
    all_kept, recomputed = (measured(Case(model, 24, checkpointing=grain)).step_bytes for grain in ("none", "layer"))
    assert recomputed < 0.95 * all_kept


def test_what_only_ours_has_is_refused_of_others():
    with pytest.raises(ValueError, match="only the model ours"):
        build_benchmark_model(Case("led", 2, checkpointing="segment"), SETTING)
    with pytest.raises(ValueError, match="only the model ours"):
        build_benchmark_model(Case("rmt", 2, task="sections"), SETTING)
    with pytest.raises(ValueError, match="only the model ours"):
        build_benchmark_model(Case("bart", 2, decoder_context="all"), SETTING)
    with pytest.raises(ValueError, match="only the model ours"):
        build_benchmark_model(Case("rmt", 2, has_state=False), SETTING)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("rmt", 2, graphed=True), "CUDA graph: CUDA graphs need a GPU, but the device is cpu"),
        (Case("segenc", 2, checkpointing="layer", graphed=True), "needs checkpointing='none'"),
        (Case("led", 2, graphed=True), "training and inference of rmt, segenc, bart"),
        (Case("bart", 1, "generation", graphed=True), "training and inference of rmt, segenc, bart"),
    ],
)
def test_graphs_that_cannot_be_captured_are_refused(case, reason):
    with pytest.raises(ValueError, match=reason):
        build_benchmark_model(case, SETTING)


def test_the_context_and_the_state_of_a_case_are_the_models():
    case = Case("ours", 2, decoder_context="all", has_state=False)
    config = build_benchmark_model(case, SETTING).model.config
    assert (config.decoder_context, config.pre_seq_len, config.bptt_depth) == ("all", 0, -1)
    config = build_benchmark_model(Case("ours", 2), SETTING).model.config
    assert (config.decoder_context, config.pre_seq_len) == ("last", 20)


@pytest.mark.parametrize("model", MODELS)
def test_attention_is_what_the_legend_says(model):
    subject = build_benchmark_model(Case(model, 2), SETTING).model
    config = getattr(subject, "config", None) or subject.bart.config
    eager = ("led", "longt5")
    assert config._attn_implementation == ("eager" if model in eager else "sdpa")


@pytest.mark.slow
def test_the_schedule_of_a_case_is_the_one_that_runs(monkeypatch):
    calls = []
    step = wavefront.diagonal_step
    monkeypatch.setattr(wavefront, "diagonal_step", lambda *inputs: calls.append(1) or step(*inputs))
    measured(passes("document", -1, "none", 3))
    assert not calls
    measured(passes("document", -1, "none", 3, "wavefront"))
    assert calls


def test_memory_that_is_not_enough_is_a_result(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "build_benchmark_model", fail)
    found = measured(Case("bart", 4))
    assert found.outcome == OUT_OF_MEMORY
    assert not found.step_seconds


@pytest.mark.slow
def test_memory_is_measured_once_and_time_in_every_turn():
    found = Measurement(matrix_peak=1e9)
    for _ in range(2):
        measure(Case("rmt", 2), SETTING, found, n_warmup=0, n_passes=2)
        n_bytes = found.step_bytes
    assert found.step_bytes == n_bytes
    assert len(found.step_seconds) == 4


def test_the_peak_of_products_is_one():
    assert 1e8 < matrix_peak(SETTING.device, torch.float32) < 1e14
