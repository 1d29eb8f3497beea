"""Fused cells equal plain cells; the kernels run in Triton's interpreter on a CPU."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers.activations import ACT2FN

from counted_calls import OperationsCalled, count_calls
from played_graphs import play_graphs
from recurrent_bart.execution import diagonal_graphs, fused_cell, grid, wavefront
from tiny import NORM_ORDERS, random_ids, tiny_model

# a width that is not a power of two; few rows, because the interpreter runs their programs one after the other
SHAPE = {
    **{"d_model": 48, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "decoder_layers": 1},
    **{"activation_function": "gelu", "pre_seq_len": 2},
}
FIELDS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "own projection": {"prefix_projection": False, "update_gate": False},
    "pre-norm": {"prefix_attention": "gated", "normalize_before": True},
    "pre-norm concat": {"prefix_attention": "concat", "normalize_before": True},
    "pre-norm own projection": {"prefix_projection": False, "update_gate": False, "normalize_before": True},
}


@pytest.fixture
def interpreted(monkeypatch):
    """Fuse diagonals on a CPU; return a list that grows by one with each cell."""
    monkeypatch.setattr(wavefront, "can_fuse", lambda config, stream: True)
    return count_calls(monkeypatch, wavefront, "fused_cell")


def documents(task, n_documents=2, n_segments=3, n_tokens=4):
    """Return ragged documents, with padding inside a segment and absent segments."""
    torch.manual_seed(1)
    mask = torch.ones(n_documents, n_segments, n_tokens, dtype=torch.long)
    mask[1, -1], mask[1, -2, 3:] = 0, 0
    labels = random_ids(n_documents, n_segments, 4)
    labels[~mask.bool().any(-1)] = -100
    labels = labels if task == "sections" else labels[:, 0]
    return {"input_ids": random_ids(n_documents, n_segments, n_tokens), "attention_mask": mask, "labels": labels}


def build(schedule, **fields):
    torch.manual_seed(0)
    return tiny_model(schedule=schedule, **SHAPE | fields).train()


def results(schedule, inputs, checkpointing="none", **fields):
    model = build(schedule, **fields)
    model.set_gradient_checkpointing(checkpointing)
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# the middle diagonals of three layers and two segments lack the first layer or the last one; three segments pass two
# states on
THREE_LAYERS, THREE_SEGMENTS = {"n_layers": 3, "n_segments": 2}, {"n_layers": 2, "n_segments": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "task", "sizes"),
    [
        ("gated", "document", THREE_LAYERS),
        ("gated", "sections", THREE_SEGMENTS),
        ("concat", "document", THREE_SEGMENTS),
        ("own projection", "sections", THREE_LAYERS),
        ("pre-norm", "document", THREE_LAYERS),
        ("pre-norm", "sections", THREE_SEGMENTS),
        ("pre-norm concat", "document", THREE_SEGMENTS),
        ("pre-norm own projection", "sections", THREE_LAYERS),
    ],
    ids=str,
)
def test_values_and_gradients_are_the_plain_ones(interpreted, fields, task, sizes):
    """Combine each field with one task and one size, and gated ones with both: a cell does not know its task."""
    inputs = documents(task, n_segments=sizes["n_segments"])
    fields = FIELDS[fields] | {"encoder_layers": sizes["n_layers"]}
    expected_loss, expected = results("sequential", inputs, **fields)
    loss, gradients = results("wavefront", inputs, **fields)
    assert interpreted
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["layer", "segment"])
@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_checkpointing_changes_no_number(interpreted, norms, checkpointing):
    """Dropout is on; its seeds are kept for the backward pass."""
    inputs = documents("document", n_segments=2)
    fields = {"dropout": 0.2, "hidden_dropout_prob": 0.2, "encoder_layers": 1, **norms}
    expected_loss, expected = results("wavefront", inputs, **fields)
    loss, gradients = results("wavefront", inputs, checkpointing, **fields)
    assert interpreted
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_replayed_ones_too(interpreted, monkeypatch, fields):
    """Forward passes write their outputs where the next diagonal reads them."""
    monkeypatch.setattr(grid, "is_wavefront_faster", lambda segments: True)
    monkeypatch.setattr(grid, "can_graph", lambda *batch: True)
    play_graphs(monkeypatch, diagonal_graphs)
    fields = {"encoder_layers": 2, **fields}
    model = {schedule: build(schedule, **fields).eval() for schedule in ("sequential", "auto")}
    inputs = documents("document")
    inputs.pop("labels")
    with torch.no_grad():
        expected = model["sequential"].model.encode(**inputs)
        for _ in range(2):
            found = model["auto"].model.encode(**inputs)
            torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.state.memory, expected.state.memory, rtol=1e-4, atol=1e-5)
    assert interpreted


SETTINGS = {
    "dropout": (lambda layer, _: setattr(layer, "dropout", 1.0), {}),
    "activation dropout": (lambda layer, _: setattr(layer, "activation_dropout", 1.0), {}),
    "eval() of the layers": (lambda layer, _: layer.eval(), {"dropout": 0.5, "activation_dropout": 0.5}),
    "eval() of attention": (lambda layer, _: layer.self_attn.eval(), {"attention_dropout": 0.5}),
    "eval() of prefix dropout": (lambda _, recurrence: recurrence.dropout.eval(), {"hidden_dropout_prob": 0.5}),
    "epsilon": (lambda layer, _: setattr(layer.final_layer_norm, "eps", 0.5), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
@pytest.mark.parametrize(("change", "fields"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_layers_that_were_changed_hold(interpreted, change, fields, norms):
    """All rates are 0 or 1, so no random number is drawn."""
    found, inputs = [], documents("document", n_segments=2)
    inputs.pop("labels")
    for schedule in ("sequential", "wavefront"):
        model = build(schedule, encoder_layers=2, **fields, **norms)
        model.model.encoder.dropout = 0.0
        for layer in model.model.encoder.layers:
            change(layer, model.model.encoder.recurrence)
        output = model.model.encode(**inputs)
        found.append((output.last_hidden_state, output.state.memory))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert interpreted


@pytest.mark.parametrize(("activation", "expected"), [("gelu", True), ("gelu_python", False), ("relu", False)])
def test_cells_are_fused_of_layers_with_the_exact_gelu_alone(monkeypatch, activation, expected):
    """The layers' activation modules count, not the configuration."""
    model = build("wavefront")
    for layer in model.model.encoder.layers:
        layer.activation_fn = ACT2FN[activation]
    # stands for a tensor on a GPU
    stream = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert fused_cell.can_fuse(model.model.encoder.layers[0], stream) == expected


def test_dropout_is_the_same_again_in_the_backward_pass(interpreted):
    """The inputs are ones on a stream of zeros. Outputs below 0 are dropped ones, whose gradients are 0."""
    from recurrent_bart.execution.kernels.residual_norm import residual_norm

    torch.manual_seed(0)
    stream, ones = torch.zeros(2, 12, 48), torch.ones(2, 12, 48, requires_grad=True)
    weight, nothing = torch.ones(2, 1, 48), torch.zeros(2, 1, 48)
    out = residual_norm(stream, ones, nothing, weight, nothing, 1e-5, 0.3)
    is_dropped = out < 0
    assert is_dropped.float().mean() == pytest.approx(0.3, abs=0.03)
    (out * torch.randn(2, 12, 48)).sum().backward()
    assert torch.equal(ones.grad == 0, is_dropped)


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "n_maps"), [("gated", 7), ("own projection", 5)])
def test_gradients_of_maps_are_computed_where_they_are_added_up(interpreted, fields, n_maps):
    """A layer has four maps, plus projection and gate (three) or keys and values again (one); there are 4 diagonals."""
    # 33 rows: with this number, no output has as many elements as a weight
    model = build("wavefront", **FIELDS[fields], pre_seq_len=3)
    loss = model(**documents("document", 3, 2, n_tokens=8)).loss
    layer, recurrence = model.model.encoder.layers[0], model.model.encoder.recurrence.by_layer()
    sizes = [weight.numel() for weight in layer.parameters() if weight.dim() == 2]
    sizes += [3 * 48 * 48, 2 * 48 * 48, *(weight[0].numel() for weight in recurrence.values())]
    with OperationsCalled({n_layers * size for n_layers in (1, 2, 3) for size in sizes}) as operations:
        loss.backward()
    assert operations.found.count("baddbmm_.default") == 4 * n_maps


@pytest.mark.slow
def test_layers_of_both_norm_orders_need_as_many_operations_and_bytes(interpreted):
    """Count operations between matrix products on tensors of a diagonal's size, and bytes for the backward pass."""
    operations, saved = [], []
    for norms in NORM_ORDERS.values():
        # one layer and few rows, because counting makes the interpreter slower still
        model, storages = build("wavefront", dropout=0.1, encoder_layers=1, **FIELDS["gated"], **norms), {}
        inputs = documents("document", n_segments=2)
        inputs.pop("labels")

        def keep(tensor, storages=storages):
            # holds the storage, so that no other tensor gets its address
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, OperationsCalled({2 * (2 + 4) * 48}) as called:
            model.model.encode(**inputs).last_hidden_state.sum().backward()
        is_free = "empty", "new_empty", "bmm", "baddbmm", "set_"
        operations.append(Counter(name for name in called.found if not name.startswith(is_free)))
        saved.append(sum(storage.nbytes() for storage in storages.values()))
    assert interpreted
    assert operations[0] == operations[1]
    assert saved[1] == pytest.approx(saved[0], rel=0.03)
