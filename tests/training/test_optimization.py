"""Which parameters decay, how fast each kind learns, and how the learning rate goes."""

import pytest
import torch

from recurrent_bart.training.arguments import RunArguments
from recurrent_bart.training.optimization import (
    LearningRates,
    build_optimizer,
    build_scheduler,
    is_recurrence,
    learning_rate_factor,
)
from tiny import tiny_model

CASES = [
    {"recurrence": "layerwise", "prefix_projection": True},
    {"recurrence": "layerwise", "prefix_projection": False, "prefix_attention": "concat"},
    {"recurrence": "top"},
    {"recurrence": "none"},
]


def optimizer_of(model, backbone=0.1, recurrence=0.2, weight_decay=0.5):
    """The optimizer and, for each parameter's name, its learning rate and decay."""
    optimizer = build_optimizer(model, LearningRates(backbone, recurrence), weight_decay)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return optimizer, found


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_every_parameter_is_in_one_group(changes):
    model = tiny_model(**changes)
    optimizer, found = optimizer_of(model)
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_what_bart_does_not_have_is_the_recurrences_and_has_its_rate(changes, bart):
    _, found = optimizer_of(tiny_model(**changes))
    in_bart = {name for name, _ in bart.named_parameters()}
    for name, (rate, _) in found.items():
        assert is_recurrence(name) == (name not in in_bart), name
        assert rate == (0.1 if name in in_bart else 0.2), name


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_only_matrices_decay(changes):
    """Not biases, norms and gates of heads; a stack of vectors, one a layer, has two dimensions and is none."""
    _, found = optimizer_of(tiny_model(**changes))
    for name, (_, decay) in found.items():
        is_vector = any(part in name for part in ("bias", "norm", "prefix_gate", "memory_gate"))
        assert decay == (0.0 if is_vector else 0.5), name
    assert {0.0, 0.5} <= {decay for name, (_, decay) in found.items() if "recurrence." in name}


def test_a_step_keeps_of_squared_gradients_what_is_asked_for():
    """Of a gradient of 1, with a step of 0 behind it."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(model, LearningRates(0.1, 0.1), 0.0, adam_beta2=0.75)
    for gradient in (1.0, 0.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    assert float(optimizer.state[model.weight]["exp_avg_sq"]) == pytest.approx(0.75 * 0.25)


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    for parameter in model.model.decoder.parameters():
        parameter.requires_grad_(False)
    _, found = optimizer_of(model)
    assert found
    assert not any(".decoder." in name for name in found)


@pytest.mark.parametrize(
    ("given", "is_pretrained", "rates"),
    [
        ({}, True, (3e-5, 3e-4)),
        ({}, False, (3e-3, 3e-3)),
        ({"learning_rate": 1e-4}, True, (1e-4, 1e-3)),
        ({"learning_rate": 1e-4}, False, (1e-4, 1e-4)),
        ({"learning_rate": 1e-4, "recurrence_learning_rate": 5e-4}, True, (1e-4, 5e-4)),
        ({"learning_rate": 0.0, "recurrence_learning_rate": 5e-4}, True, (0.0, 5e-4)),
        ({"recurrence_learning_rate": 0.0}, True, (3e-5, 0.0)),
    ],
)
def test_rates_are_those_given_or_suit_the_model(given, is_pretrained, rates):
    found = LearningRates.of(RunArguments(**given), is_pretrained, d_model=128)
    assert (found.backbone, found.recurrence) == pytest.approx(rates)


def test_a_wider_model_from_scratch_learns_more_slowly():
    assert LearningRates.of(RunArguments(), False, d_model=1024).backbone == pytest.approx(3e-3 / 8)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("cosine", [0.2, 0.4, 0.6, 0.8, 1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]),
        ("constant", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_warm_up_and_decay(schedule, shares):
    factor = learning_rate_factor(schedule, warmup_steps=4, max_steps=8)
    assert [factor(step) for step in range(10)] == pytest.approx(shares, abs=1e-4)


def test_every_step_of_a_run_moves_the_weights():
    """Neither the first nor the last one has a learning rate of 0."""
    for schedule in ("linear", "cosine"):
        factor = learning_rate_factor(schedule, 0, 3)
        assert [factor(step) > 0 for step in range(4)] == [True, True, True, False]


def test_the_schedule_scales_each_groups_own_rate():
    optimizer, _ = optimizer_of(tiny_model(), backbone=0.1, recurrence=0.4)
    scheduler = build_scheduler(optimizer, RunArguments(max_steps=4, warmup_steps=1, lr_scheduler="linear"))
    rates = []
    for _ in range(4):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
        scheduler.step()
    assert torch.tensor(rates) == pytest.approx(
        torch.tensor([[0.05, 0.2], [0.1, 0.4], [0.1 * 2 / 3, 0.4 * 2 / 3], [0.1 / 3, 0.4 / 3]])
    )
