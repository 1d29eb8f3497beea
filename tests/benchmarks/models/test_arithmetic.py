"""FLOPs of the other models equal PyTorch's count, minus values that are computed and discarded."""

import pytest
import torch

from counted_flops import counted_flops
from recurrent_bart.benchmarks.models.benchmark_models import BenchmarkSetting, build_benchmark_model
from recurrent_bart.benchmarks.models.cases import Case
from recurrent_bart.benchmarks.models.measure import random_batch

SETTING = BenchmarkSetting("tiny", 32, torch.device("cpu"), torch.float32)


def eager(subject):
    """Use eager attention, which the FLOP counter sees on a CPU."""
    for module in subject.model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"


def train(subject, batch):
    for loss in subject.losses(batch):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "least", "most"),
    [
        # its backward pass recomputes the logits
        (Case("ours", 4, schedule="sequential", batch_size=2), 0.93, 1.0),
        (Case("rmt", 4, batch_size=2), 0.98, 1.0),
        (Case("rmt", 4, bptt_depth=1), 0.98, 1.0),
        (Case("segenc", 4, batch_size=2), 0.99, 1.0),
        (Case("bart", 4, batch_size=2), 0.99, 1.0),
        # queries attend to a part of each key block, and windows are truncated at the first positions
        (Case("led", 16), 0.7, 1.0),
        (Case("longt5", 32), 0.8, 1.0),
    ],
    ids=lambda value: f"{value.model}{value.bptt_depth}" if isinstance(value, Case) else "",
)
def test_it_is_what_a_model_does(case, least, most):
    subject = build_benchmark_model(case, SETTING)
    eager(subject)
    batch = random_batch(case, SETTING)
    trained = subject.training_flops(batch) / counted_flops(lambda: train(subject, batch))
    assert least < trained <= most + 1e-6
    subject.model.eval()
    with torch.no_grad():
        read = subject.encoder_flops(batch) / counted_flops(lambda: subject.encode(batch))
    assert least - 0.1 < read <= most + 1e-6


def test_windows_grow_with_the_document_and_squares_with_its_square():
    flops = {
        model: [
            build_benchmark_model(Case(model, n), SETTING).encoder_flops(random_batch(Case(model, n), SETTING))
            for n in (64, 128)
        ]
        for model in ("led", "bart", "rmt", "segenc")
    }
    assert flops["led"][1] == pytest.approx(2 * flops["led"][0], rel=0.01)
    assert flops["rmt"][1] == pytest.approx(2 * flops["rmt"][0])
    assert flops["segenc"][1] == pytest.approx(2 * flops["segenc"][0])
    assert flops["bart"][1] > 3 * flops["bart"][0]
