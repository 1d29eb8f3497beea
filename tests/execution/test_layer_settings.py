"""Encoder layers compute with their own settings in each schedule."""

import copy

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from counted_calls import count_calls
from played_graphs import play_graphs
from recurrent_bart.execution import diagonal_graphs, graphed_wavefront, grid, retained_diagonals, wavefront
from tiny import random_ids


def first_value(attention, query, key, value, mask, **kwargs):
    """Return the first value that is attended to for each query, as an attention implementation."""
    return value[:, :, :1].expand(-1, -1, query.shape[2], -1).transpose(1, 2), None


AttentionInterface.register("first_value", first_value)


def own_attention(layer):
    layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    layer.self_attn.config._attn_implementation_internal = "first_value"


# changes of a layer in training mode; dropout at rate 0 or 1 draws no random number
CHANGES = {
    "dropout": lambda layer: setattr(layer, "dropout", 0.0),
    "activation_dropout": lambda layer: setattr(layer, "activation_dropout", 0.0),
    "attention_dropout": lambda layer: setattr(layer.self_attn, "dropout", 0.0),
    "training": lambda layer: layer.eval(),
    "self_attn.training": lambda layer: layer.self_attn.eval(),
    "activation_fn": lambda layer: setattr(layer, "activation_fn", nn.Tanh()),
    "activation_fn.negative_slope": lambda layer: setattr(layer, "activation_fn", nn.LeakyReLU(0.7)),
    "self_attn.scaling": lambda layer: setattr(layer.self_attn, "scaling", 2.0),
    "self_attn.config": own_attention,
    "final_layer_norm.eps": lambda layer: setattr(layer.final_layer_norm, "eps", 0.5),
}
# changes that the wavefront schedule supports for no layer
OBSTACLES = {
    "hooks": lambda layer: layer.fc1.register_forward_hook(lambda module, inputs, output: output.tanh()),
    "parts": lambda layer: setattr(layer, "fc2", nn.Sequential(layer.fc2, nn.Tanh())),
    "weighted activation": lambda layer: setattr(layer, "activation_fn", nn.PReLU(init=0.3).double()),
    "no bias": lambda layer: setattr(layer.fc1, "bias", None),
}
# fields that make a change of one attribute visible in the outputs
FIELDS = {
    "dropout": {"dropout": 1.0},
    "activation_dropout": {"activation_dropout": 1.0},
    "attention_dropout": {"attention_dropout": 1.0},
    "training": {"activation_dropout": 1.0},
    "self_attn.training": {"attention_dropout": 1.0},
}


@pytest.fixture
def graphed(monkeypatch):
    """Have schedule="auto" use played graphs on a CPU; return the growing list of graphs."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: 0)
    monkeypatch.setattr(grid, "is_wavefront_faster", lambda segments: True)
    monkeypatch.setattr(grid, "can_graph", lambda *batch: True)
    return play_graphs(monkeypatch, diagonal_graphs, retained_diagonals)


def build(make_model, name, change, layers, schedule):
    """Return a model with changed layers, and the sequential model that it must equal."""
    torch.manual_seed(0)
    model = make_model(attn_implementation="eager", **FIELDS.get(name, {})).train()
    for number in layers:
        change(model.model.encoder.layers[number])
    other = copy.deepcopy(model)
    model.config.schedule, other.config.schedule = schedule, "sequential"
    return model, other


def outputs(model, ids):
    output = model.model.encode(ids)
    return output.last_hidden_state, output.state.memory


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["wavefront", "auto"])
@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize(("name", "change"), (CHANGES | OBSTACLES).items(), ids=CHANGES | OBSTACLES)
def test_a_layer_with_settings_of_its_own_keeps_them(make_model, graphed, monkeypatch, name, change, changed, schedule):
    said = []
    monkeypatch.setattr(grid.logger, "warning_once", said.append)
    ids = random_ids(2, 4, 8)
    model, expected = build(make_model, name, change, [changed], schedule)
    torch.testing.assert_close(outputs(model, ids), outputs(expected, ids), rtol=0, atol=1e-10)
    unchanged, _ = build(make_model, name, lambda layer: None, [], "sequential")
    assert not torch.allclose(outputs(unchanged, ids)[0], outputs(model, ids)[0])
    assert not graphed
    is_named = name in CHANGES and name != "attention_dropout"
    assert all("one after the other" in text for text in said)
    assert bool(said) == (schedule == "wavefront")
    if said and is_named:
        assert name.split(".")[0] in said[0]


@pytest.mark.parametrize("schedule", ["wavefront", "auto"])
@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES)
def test_settings_that_all_layers_share_leave_the_schedule_as_it_is(
    make_model, graphed, monkeypatch, name, change, schedule
):
    steps = count_calls(monkeypatch, wavefront if schedule == "wavefront" else diagonal_graphs, "diagonal_step")
    ids = random_ids(2, 4, 8)
    model, expected = build(make_model, name, change, [0, 1, 2], schedule)
    torch.testing.assert_close(outputs(model, ids), outputs(expected, ids), rtol=0, atol=1e-10)
    assert steps
    assert bool(graphed) == (schedule == "auto")


def test_layers_of_different_types_or_devices_are_not_stacked(make_model):
    model = make_model(schedule="wavefront")
    for change in (nn.Module.float, lambda layer: layer.to("meta")):
        model.model.encoder.layers[1] = change(copy.deepcopy(model.model.encoder.layers[0]))
        assert "types or devices" in grid.why_not_stacked(model.model.encoder.layers)


@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "gelu_pytorch_tanh", "relu", "leaky_relu"])
def test_layers_as_they_are_built_are_stacked(make_model, activation):
    """Every layer has a separate activation module and a separate layer index."""
    assert not grid.why_not_stacked(make_model(activation_function=activation).model.encoder.layers)
