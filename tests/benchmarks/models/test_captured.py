"""Captured steps train as plain steps do."""

import pytest
import torch
from transformers import masking_utils

from played_graphs import play_graphs
from recurrent_bart.benchmarks.models import captured
from recurrent_bart.benchmarks.models.benchmark_models import (
    BenchmarkSetting,
    build_benchmark_model,
)
from recurrent_bart.benchmarks.models.cases import GRAPHED_MODELS, Case
from recurrent_bart.benchmarks.models.measure import Measurement, measure, random_batch, work_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def setting_on(device):
    return BenchmarkSetting("tiny", 16, device, torch.float32)


def weights_after(case, device, n_steps, dropout):
    torch.manual_seed(0)
    setting = setting_on(device)
    plain = Case(case.model, case.n_segments, case.work, case.batch_size)
    subject = build_benchmark_model(plain, setting)
    for module in subject.model.modules():
        for name in ("dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    step = work_of(case, subject, random_batch(case, setting), setting)
    for _ in range(n_steps):
        step()
    return torch.cat([parameter.detach().flatten() for parameter in subject.model.parameters()])


def check_training(model, device):
    trained = [weights_after(Case(model, 3, graphed=graphed), device, 3, 0.0) for graphed in (False, True)]
    # on a GPU, sums of embeddings' gradients differ from call to call
    torch.testing.assert_close(*trained, rtol=0, atol=1e-5 if device == GPU else 1e-6)
    assert not torch.equal(trained[1], weights_after(Case(model, 3, graphed=True), device, 2, 0.0))


@pytest.mark.parametrize("model", GRAPHED_MODELS)
def test_captured_steps_train_as_plain_steps(monkeypatch, model):
    play_graphs(monkeypatch, captured)
    check_training(model, CPU)


def test_a_step_reads_the_batch_again(monkeypatch):
    play_graphs(monkeypatch, captured)
    case, setting = Case("segenc", 3, "passes", graphed=True), setting_on(CPU)
    subject, batch = build_benchmark_model(Case("segenc", 3, "passes"), setting), random_batch(case, setting)
    subject.model.eval()
    step = work_of(case, subject, batch, setting)
    losses = [float(step())]
    batch.labels.copy_(batch.labels.flip(-1))
    losses.append(float(step()))
    (expected,) = subject.losses(batch)
    assert losses[0] != losses[1] == pytest.approx(float(expected.detach()))


@pytest.mark.gpu
@pytest.mark.parametrize("model", GRAPHED_MODELS)
def test_captured_steps_train_as_plain_steps_on_a_gpu(model):
    check_training(model, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("model", GRAPHED_MODELS)
def test_dropout_differs_between_replays_on_a_gpu(model):
    case, setting = Case(model, 3, "passes", graphed=True), setting_on(GPU)
    step = work_of(case, build_benchmark_model(case, setting), random_batch(case, setting), setting)
    assert float(step()) != float(step())


@pytest.mark.gpu
@pytest.mark.parametrize("work", ["training", "inference"])
def test_a_captured_case_is_measured_on_a_gpu(work):
    found = Measurement(matrix_peak=1e12)
    measure(Case("rmt", 3, work, graphed=True), setting_on(GPU), found, n_warmup=1, n_passes=2)
    assert found.outcome == "measured"
    assert len(found.step_seconds) == 2


def test_masks_that_hide_nothing_are_not_built_during_a_capture(monkeypatch):
    traced = masking_utils.is_tracing
    with captured.masks_left_out():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not masking_utils.is_tracing(torch.ones(1))
    assert masking_utils.is_tracing is traced
