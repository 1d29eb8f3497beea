"""Optimizer: decayed parameters, learning rates by kind, and the learning rate scheduler."""

import pytest
import torch

from recurrent_bart.training.adapters import choose_trained
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.optimization import (
    LearningRates,
    build_optimizer,
    build_scheduler,
    is_recurrence,
    learning_rate_factor,
)
from recurrent_bart.training.run_arguments import LR_SCHEDULERS, RunArguments
from tiny import tiny_model

# each field that adds or removes parameters
CASES = [
    {"recurrence": "layerwise", "prefix_projection": True, "prefix_attention": "gated"},
    {"recurrence": "layerwise", "prefix_projection": False, "prefix_attention": "concat"},
    {"recurrence": "layerwise", "update_gate": False},
    {"recurrence": "top", "prefix_attention": "gated"},
    {"recurrence": "top", "prefix_projection": False, "prefix_attention": "concat"},
    {"recurrence": "none", "prefix_attention": "gated"},
    {"recurrence": "none", "prefix_projection": False},
    {"associative_memory": True, "prefix_attention": "gated"},
    {"associative_memory": True, "prefix_projection": False, "update_gate": False, "prefix_attention": "concat"},
    {"decoder_context": "memory"},
    {"pre_seq_len": 1, "prefix_hidden_size": 1, "associative_memory": True},
    {"pre_seq_len": 0},
    {"tie_word_embeddings": False},
]
# True for parameters that decay, by the last part of their names
DECAYED = {
    *("initial_memory", "slot_embedding", "projection_in", "projection_out", "update_gate", "write_strength"),
    *("shared", "embed_tokens", "embed_positions", "lm_head", "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),
    *("lora_A", "lora_B"),
}
NOT_DECAYED = {
    *("projection_in_bias", "projection_out_bias", "update_gate_bias", "write_strength_bias"),
    *("prefix_gate", "matrix_gate", "memory_gate"),
    *("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layernorm_embedding"),
}


def is_decayed(name):
    """Return True if a parameter decays by the tables above; raise KeyError for an unknown name."""
    *path, last = name.removesuffix(".default.weight").split(".")
    if last == "bias":
        return False
    kind = path[-1] if last == "weight" else last
    if kind not in DECAYED | NOT_DECAYED:
        raise KeyError(name)
    return kind in DECAYED


def optimizer_of(model, backbone=0.1, recurrence=0.2, weight_decay=0.5):
    """Return the optimizer, and the learning rate and decay of each parameter by name."""
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
    # includes each name of tied weights
    in_bart = set(bart.state_dict())
    for name, (rate, _) in found.items():
        assert is_recurrence(name) == (name not in in_bart), name
        assert rate == (0.1 if name in in_bart else 0.2), name


@pytest.mark.parametrize("trained", [{}, {"train": "prefix"}, {"lora_r": 2}], ids=str)
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_every_parameter_by_name_is_in_the_group_of_its_kind(changes, trained, bart):
    """Check that biases, norms and gates do not decay, although stacks of them have two or more dimensions."""
    if changes.get("pre_seq_len") == 0 and trained.get("train") == "prefix":
        pytest.skip("there is nothing to train")
    model = tiny_model(**changes)
    choose_trained(model, ModelArguments(**trained))
    _, found = optimizer_of(model)
    in_bart = set(bart.state_dict())
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in found.items():
        assert rate == (0.1 if name in in_bart else 0.2), name
        assert decay == (0.5 if is_decayed(name) else 0.0), name


@pytest.mark.slow
def test_the_tables_of_this_file_hold_the_names_of_models_alone():
    """Find outdated names in the tables, which could hide that a new name is missing."""
    last_parts = set()
    for changes in CASES:
        model = tiny_model(**changes)
        choose_trained(model, ModelArguments(lora_r=2))
        last_parts |= {part for name, _ in model.named_parameters() for part in name.split(".")[-4:]}
    assert last_parts >= DECAYED | NOT_DECAYED


@pytest.mark.parametrize(("backbone", "recurrence", "decay"), [(0.1, 0.1, 0.5), (0.1, 0.2, 0.0), (0.0, 0.0, 0.0)])
def test_groups_are_the_same_whatever_their_values(backbone, recurrence, decay):
    """Compare the groups for equal and different values: a checkpoint must fit a run with other flags."""

    def members(*values):
        model = tiny_model(associative_memory=True)
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer, _ = optimizer_of(model, *values)
        return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    assert len(members()) == 4
    assert members(backbone, recurrence, decay) == members()


def test_a_step_keeps_of_squared_gradients_what_is_asked_for():
    """Check the second moment after a step with gradient 1 and a step with gradient 0."""
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
        ("constant_with_warmup", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # after the warm-up, the square root of 5 / (step + 1)
        ("inverse_sqrt", [0.2, 0.4, 0.6, 0.8, 1.0, 0.9129, 0.8452, 0.7906, 0.7454, 0.7454]),
    ],
)
def test_warm_up_and_decay(schedule, shares):
    factor = learning_rate_factor(schedule, warmup_steps=4, max_steps=8)
    assert [factor(step) for step in range(10)] == pytest.approx(shares, abs=1e-4)


def test_every_step_of_a_run_moves_the_weights():
    """Check that neither the first nor the last step has learning rate 0."""
    for schedule in LR_SCHEDULERS:
        for warmup_steps in range(4):
            factor = learning_rate_factor(schedule, warmup_steps, max_steps=3)
            assert all(0 < factor(step) <= 1 for step in range(3)), (schedule, warmup_steps)
        if schedule in ("linear", "cosine"):
            assert learning_rate_factor(schedule, 0, 3)(3) == 0


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
