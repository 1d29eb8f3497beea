"""A CUDA graph is replayed only with the settings of its capture; on a CPU, a replay runs the captured function."""

import contextlib
import copy
import threading

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from played_graphs import play_graphs
from recurrent_bart.execution import cuda_graphs, diagonal_graphs, graphed_wavefront, grid, retained_diagonals
from recurrent_bart.execution.graph_guards import GraphUser, device_guard, graph_store
from recurrent_bart.model import modeling_decoder, modeling_encoder
from tiny import batch_of, random_ids


def of_layers(change):
    """Change all layers of the encoder and of the decoder."""
    return lambda model: [change(layer) for part in (model.model.encoder, model.model.decoder) for layer in part.layers]


def of_adapters(change):
    """Change all adapters."""
    return lambda model: [change(part) for part in model.modules() if isinstance(part, LoraLayer)]


# changes of a model between two steps, and the fields that make them visible; dropout at rate 1 draws no random number
EAGER = {"attn_implementation": "eager"}
CHANGES = {
    "dropout": (of_layers(lambda layer: setattr(layer, "dropout", 0.0)), {"dropout": 1.0}),
    "activation dropout": (
        of_layers(lambda layer: setattr(layer, "activation_dropout", 0.0)),
        {"activation_dropout": 1.0},
    ),
    "eval() of the layers": (of_layers(nn.Module.eval), {"activation_dropout": 1.0}),
    "activation": (of_layers(lambda layer: setattr(layer, "activation_fn", nn.Tanh())), {}),
    "epsilon": (of_layers(lambda layer: setattr(layer.final_layer_norm, "eps", 0.5)), {}),
    "attention implementation": (lambda model: model.set_attn_implementation("sdpa"), EAGER),
    "type": (nn.Module.float, {}),
}
ENCODER_CHANGES = {
    "attention dropout": (
        of_layers(lambda layer: setattr(layer.self_attn, "dropout", 0.0)),
        {"attention_dropout": 1.0} | EAGER,
    ),
    "eval() of attention": (of_layers(lambda layer: layer.self_attn.eval()), {"attention_dropout": 1.0} | EAGER),
    "prefix dropout": (lambda model: setattr(model.model.encoder.recurrence.dropout, "p", 1.0), {}),
    "eval() of prefix dropout": (
        lambda model: model.model.encoder.recurrence.dropout.eval(),
        {"hidden_dropout_prob": 0.5},
    ),
}
DECODER_CHANGES = {
    "eval() of one layer": (lambda model: model.model.decoder.layers[1].eval(), {"activation_dropout": 1.0}),
    "activation of one layer": (lambda model: setattr(model.model.decoder.layers[1], "activation_fn", nn.Tanh()), {}),
    "adapters switched": (of_adapters(lambda part: setattr(part, "_active_adapter", ["default"])), {}),
    "adapters scaled": (of_adapters(lambda part: part.scale_layer(3.0)), {}),
    "adapters merged": (of_adapters(lambda part: part.merge()), {}),
    "adapters off": (of_adapters(lambda part: setattr(part, "_disable_adapters", True)), {}),
}
# changes that outputs do not show
SAME_OUTPUTS = {"attention implementation", "type", "adapters merged"}


@pytest.fixture
def graphs(monkeypatch):
    """Have schedule="auto" use played graphs on a CPU; return the lists of graphs of the encoder and of the decoder."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: 2**40)
    monkeypatch.setattr(grid, "is_wavefront_faster", lambda segments: True)
    monkeypatch.setattr(grid, "can_graph", lambda *batch: True)
    monkeypatch.setattr(modeling_decoder, "can_capture", lambda module, inputs: torch.is_grad_enabled())
    return play_graphs(monkeypatch, diagonal_graphs, retained_diagonals), play_graphs(monkeypatch, cuda_graphs)


def build(make_model, fields, with_adapters=False):
    model = make_model(schedule="auto", **fields)
    if with_adapters:
        # adapters on the decoder only: encoder layers with adapters run sequentially
        config = LoraConfig(r=2, target_modules=r".*decoder.*(q_proj|fc1)", init_lora_weights=False)
        for name in ("default", "other"):
            inject_adapter_in_model(config, model, name)
        model.double()
        for name, parameter in model.named_parameters():
            # freeze both adapters alike, so that they do not differ in `requires_grad`
            parameter.requires_grad_("lora" not in name)
    return model.train()


def inputs_of():
    """Return ragged documents, whose masks have a different form for each attention implementation."""
    torch.manual_seed(1)
    _, input_ids, mask = batch_of([[8, 8, 3], [5], [8, 2]])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": random_ids(3, 4)}


def results(model, inputs):
    torch.manual_seed(2)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output.loss.detach(), output.logits.detach(), output.state.memory.detach(), *gradients]


def sequential(model):
    model = copy.deepcopy(model)
    model.config.schedule = "sequential"
    return model


def check_equal(found, expected):
    tolerance = 1e-10 if expected[0].dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


ALL_CHANGES = {
    name: (parts, *change)
    for parts, changes in (((0, 1), CHANGES), ((0,), ENCODER_CHANGES), ((1,), DECODER_CHANGES))
    for name, change in changes.items()
}


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "change", "fields"), ALL_CHANGES.values(), ids=ALL_CHANGES)
def test_a_change_has_new_graphs_captured(make_model, graphs, request, parts, change, fields):
    model, inputs = build(make_model, fields, "adapters" in request.node.callspec.id), inputs_of()
    before = results(model, inputs)
    n_before = [len(captured) for captured in graphs]
    results(model, inputs)
    assert [len(captured) for captured in graphs] == n_before
    change(model)
    found = results(model, inputs)
    check_equal(found, results(sequential(model), inputs))
    name = request.node.callspec.id
    assert torch.allclose(found[1], before[1].to(found[1].dtype), atol=1e-4) == (name in SAME_OUTPUTS)
    assert {number for number in (0, 1) if len(graphs[number]) > n_before[number]} == set(parts)
    n_after = [len(captured) for captured in graphs]
    check_equal(results(model, inputs), found)
    assert [len(captured) for captured in graphs] == n_after


def test_another_number_of_state_positions_has_new_graphs_captured(make_model, graphs):
    """Contexts of one length hold the states of one segment and 12 tokens, or of two segments and 9 tokens."""
    model = build(make_model, {"prefix_attention": "gated", "decoder_context": "memory"})
    width = model.config.d_model
    embeds, context = (torch.randn(2, n, width, dtype=torch.double, requires_grad=True) for n in (4, 15))
    found, n_captured = [], []
    for n_memory in (3, 6, 3):
        inputs = {"inputs_embeds": embeds, "encoder_hidden_states": context, "n_memory": n_memory}
        expected = sequential(model).model.decoder(**inputs).last_hidden_state
        found.append(model.model.decoder(**inputs).last_hidden_state)
        check_equal([found[-1]], [expected])
        n_captured.append(len(graphs[1]))
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert 0 < n_captured[0] < n_captured[1] == n_captured[2]


def test_a_decoder_with_eager_attention_is_not_captured(make_model, graphs):
    """A capture on a GPU refuses the copy from the CPU that its causal mask makes."""
    model, inputs = build(make_model, EAGER), inputs_of()
    check_equal(results(model, inputs), results(sequential(model), inputs))
    assert [bool(captured) for captured in graphs] == [True, False]


def test_training_and_evaluation_by_turns_capture_once(make_model, graphs):
    model, inputs = build(make_model, {"activation_dropout": 1.0}), inputs_of()
    counts = []
    for _ in range(3):
        for mode in (model.train, model.eval):
            mode()
            results(model, inputs)
            counts.append([len(captured) for captured in graphs])
    assert counts[0] < counts[1] == counts[2] == counts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("retained_bytes", [0, 2**40])
def test_a_backward_pass_has_the_settings_of_its_forward_pass(make_model, graphs, monkeypatch, retained_bytes):
    """More settings than are kept run between the forward and the backward pass."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: retained_bytes)
    model, inputs, found = build(make_model, {}), inputs_of(), []
    for one in (sequential(model), model):
        loss = one(**inputs).loss
        # the loss's settings come last: a played graph runs with the settings of its replay
        for epsilon in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e-5):
            of_layers(lambda layer, epsilon=epsilon: setattr(layer.final_layer_norm, "eps", epsilon))(one)
            if epsilon != 1e-5:
                one(**inputs)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in one.parameters())])
    check_equal(found[1], found[0])
    (recorder,) = graph_store(model.model.encoder.recurrence).graphs.values()
    assert len(recorder._by_settings) == diagonal_graphs.MOST_SETTINGS


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_second_thread_is_refused_and_changes_no_number(make_model, graphs, part):
    model, inputs = build(make_model, {}), inputs_of()
    expected = results(sequential(model), inputs)
    is_inside, may_go_on, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is thread:
            is_inside.set()
            assert may_go_on.wait(60)

    # called while the pass holds the graphs
    place = model.model.encoder.layernorm_embedding if part == "encoder" else model.model.decoder.layers[0].fc1
    place.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(results(model, inputs)))
    thread.start()
    assert is_inside.wait(60)
    with pytest.raises(ValueError, match="two threads run one model with schedule='auto'"):
        model(**inputs)
    may_go_on.set()
    thread.join()
    check_equal(found[0], expected)
    # sequential passes are allowed
    check_equal(results(model, inputs), expected)


def test_a_pass_that_another_one_came_into_ends():
    user = GraphUser()
    steps = user.steps_of_pass(iter("abc"))
    assert next(steps) == "a"
    assert list(user.steps_of_pass(iter("xy"))) == ["x", "y"]
    with pytest.raises(ValueError, match="one pass after the other"):
        next(steps)
    with user.whole_pass():
        pass


def test_graphs_are_captured_on_the_device_of_the_model(make_model, graphs, monkeypatch):
    devices, inside = [], []

    @contextlib.contextmanager
    def guard(device):
        inside.append(device)
        yield
        inside.pop()

    for module in (modeling_encoder, cuda_graphs):
        monkeypatch.setattr(module, "device_guard", guard)
    for module in (diagonal_graphs, cuda_graphs):
        monkeypatch.setattr(module, "warm_up", lambda *_: devices.append(list(inside)), raising=False)
    capture = diagonal_graphs.warm_up_and_capture
    monkeypatch.setattr(
        diagonal_graphs, "warm_up_and_capture", lambda *its: devices.append(list(inside)) or capture(*its)
    )
    build(make_model, {})(**inputs_of())
    assert devices
    assert all(found == [torch.device("cpu")] for found in devices)
    assert device_guard(torch.device("cuda", 1)).idx == 1
