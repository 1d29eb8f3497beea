"""Tests that the counted operations equal the count of PyTorch during a run."""

import itertools

import pytest
import torch

from counted_flops import counted_flops
from recurrent_bart.model import flops as module
from recurrent_bart.model.flops import Arithmetic, peak_flops
from tiny import random_ids, tiny_model

# FLOPs of adding embeddings and gates are not matrix products
CASES = [
    {},
    {"prefix_attention": "concat"},
    {"prefix_projection": False},
    {"update_gate": False},
    {"associative_memory": True},
    {"recurrence": "top"},
    {"recurrence": "none"},
    {"pre_seq_len": 0},
    {"decoder_context": "memory"},
    {"decoder_context": "all"},
    {"decoder_context": "section"},
    {"decoder_context": "memory", "context_segments": 2},
    {"decoder_context": "all", "context_segments": 2},
    {"bptt_depth": 1},
]


def counted(model, ids, labels):
    """Return the FLOPs of a forward and backward pass by PyTorch's counter."""
    model.set_attn_implementation("eager")
    model.config.schedule = "sequential"
    return counted_flops(lambda: model(ids, labels=labels).loss.backward())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(map(str, changes.values())) or "default")
def test_it_is_what_a_model_does(changes, task):
    model = tiny_model(**changes).train()
    ids = random_ids(2, 4, 8)
    labels = random_ids(2, 5) if task == "document" else random_ids(2, 4, 5)
    # contexts that grow with the segments are padded; the count excludes padding
    is_exact = task == "document" or model.config.decoder_context == "last"
    if task == "sections":
        # the trainer splits documents into BPTT windows; this test runs one pass
        model.config.bptt_depth = -1
    expected = counted(model, ids, labels)
    found = Arithmetic(model.config).training(torch.ones_like(ids), labels)
    # for triangular solves PyTorch counts only the products in the backward pass, and we do not count them
    tolerance = 0.02 if model.config.associative_memory else 0.001
    assert found == pytest.approx(expected, rel=tolerance if is_exact else 0.15)
    assert found <= expected


def test_padding_and_segments_that_are_not_there_count_nothing():
    config = tiny_model().config
    mask = torch.ones(2, 3, 8, dtype=torch.long)
    labels = random_ids(2, 5)
    alone = [Arithmetic(config).training(mask[:1, :n], labels[:1]) for n in (2, 3)]
    mask[0, 2] = 0
    assert Arithmetic(config).training(mask, labels) == pytest.approx(sum(alone))
    mask[1, 2, 4:] = 0
    assert Arithmetic(config).training(mask, labels) < 0.99 * sum(alone)


def test_what_is_not_trained_has_no_gradients_of_weights():
    config = tiny_model().config
    mask, labels = torch.ones(2, 3, 8, dtype=torch.long), random_ids(2, 5)
    assert Arithmetic(config, 0.0).training(mask, labels) == pytest.approx(
        2 / 3 * Arithmetic(config).training(mask, labels)
    )


@pytest.mark.parametrize(
    ("name", "is_bf16", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA A100-SXM4-80GB", True, 312e12),
        ("NVIDIA A100-SXM4-80GB", False, 19.5e12),
    ],
)
def test_the_peak_of_a_known_device_is_its_makers(monkeypatch, name, is_bf16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), is_bf16) == expected


def test_the_peak_of_a_processor_is_measured():
    found = peak_flops(torch.device("cpu"), is_bf16=False)
    assert 1e8 < found < 1e14


def test_a_moment_in_which_others_use_the_device_does_not_lower_its_peak(monkeypatch):
    """Simulate products that are all 100 times too slow, except one in the middle."""
    clock = itertools.accumulate([0.0, *[0.005] * 23, 0.00005, *[0.005] * 100])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert module._measured_peak(torch.device("cpu"), torch.float32) == pytest.approx(2 * 512**3 / 0.00005)


def test_the_peak_of_an_unknown_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Next")
    monkeypatch.setattr(module, "_measured_peak", lambda device, dtype: (device.type, dtype))
    assert peak_flops(torch.device("cuda"), is_bf16=True) == ("cuda", torch.bfloat16)
