"""The wavefront schedule equals the sequential schedule."""

import functools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from recurrent_bart.execution import grid as grid_module
from recurrent_bart.execution import wavefront
from recurrent_bart.execution.stacked_layers import stack_layers
from recurrent_bart.monitoring.memory import peak_bytes
from recurrent_bart.recurrence.grouped_linear import StackedWeightSlice, linear, slice_weights
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmented_batch import DECODE_AT
from tiny import NORM_ORDERS, batch_of, random_ids

RAGGED = [[8, 8, 3, 8, 7], [5], [8, 2, 1]]
FIELDS = {
    "no horizon": {},
    "concat": {"prefix_attention": "concat"},
    "own projection": {"prefix_projection": False, "update_gate": False},
    "associative": {"associative_memory": True, "bptt_depth": 1},
    "associative concat": {"associative_memory": True, "prefix_attention": "concat", "decoder_context": "memory"},
    "every segment alone": {"bptt_depth": 0},
    "windows": {"bptt_depth": 1},
    "overlap": {"input_size": 12},
    "memory": {"decoder_context": "memory", "bptt_depth": 1},
    "all": {"decoder_context": "all", "bptt_depth": 2},
    "section": {"decoder_context": "section", "bptt_depth": 2},
    "static": {"recurrence": "none", "decoder_context": "all"},
    "no recurrence": {"pre_seq_len": 0, "decoder_context": "all"},
}
FIELDS |= {f"{name} pre-norm": fields | {"normalize_before": True} for name, fields in FIELDS.items()}


def both(make_model, **fields):
    """Return the same model with each schedule."""
    torch.manual_seed(0)
    sequential = make_model(schedule="sequential", **fields)
    by_diagonals = make_model(schedule="wavefront", **fields)
    by_diagonals.load_state_dict(sequential.state_dict())
    return sequential, by_diagonals


def results(model, **inputs):
    """Return loss, logits, state and all gradients.

    Without a state, padding segments may be left out, so the carried context is compared without its padding.
    """
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    state = output.state.tensors()
    if not model.config.has_state and "context" in state:
        state["context"] = state["context"] * (state["context_number"] != 0).unsqueeze(2)
    found = {"loss": output.loss, "logits": output.logits} | state
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


@pytest.mark.each_value
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_values_and_gradients_are_the_sequential_ones(make_model, fields, task, attention):
    _, input_ids, mask = batch_of(RAGGED)
    labels = random_ids(3, 4) if task == "document" else random_ids(3, 5, 4).masked_fill(~mask.bool()[:, :, :1], -100)
    expected, found = (
        results(model, input_ids=input_ids, attention_mask=mask, labels=labels)
        for model in both(make_model, attn_implementation=attention, **fields)
    )
    check_equal(found, expected)


def test_documents_given_flat_are_cut_with_overlap_alike(make_model):
    sequential, by_diagonals = both(make_model, input_size=12)
    inputs = {"input_ids": random_ids(2, 45), "labels": random_ids(2, 4)}
    check_equal(results(by_diagonals, **inputs), results(sequential, **inputs))


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_it_goes_on_from_a_state(make_model, norms):
    """The second of three documents has not begun, and the third has no further text."""
    sequential, by_diagonals = both(make_model, **norms)
    _, input_ids, mask = batch_of([[8, 8, 3], [5, 8], [8]])
    mask[2] = 0
    found = []
    for model in (sequential, by_diagonals):
        torch.manual_seed(1)
        memory = torch.randn(3, 3, 3, 16, dtype=torch.float64, requires_grad=True)
        state = RecurrentState(torch.tensor([4, 0, 2]), memory)
        output = model.model.encoder(input_ids, attention_mask=mask, state=state)
        loss = output.last_hidden_state.sin().sum() + output.state.memory.cos().sum()
        (gradient,) = torch.autograd.grad(loss, memory)
        found.append({"gradient": gradient, "hidden": output.last_hidden_state} | output.state.tensors())
    check_equal(found[1], found[0])
    torch.testing.assert_close(found[1]["memory"][2], memory[2])


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_a_stream_read_in_parts_is_one_read_at_once(make_model, norms):
    _, model = both(make_model, **norms)
    ids = random_ids(2, 7, 8)
    whole = model.model.encoder(ids)
    first = model.model.encoder(ids[:, :4])
    then = model.model.encoder(ids[:, 4:], state=first.state)
    torch.testing.assert_close(then.last_hidden_state, whole.last_hidden_state, rtol=0, atol=1e-12)
    torch.testing.assert_close(then.state.memory, whole.state.memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_what_layers_give_is_handed_out(make_model, norms):
    sequential, by_diagonals = both(make_model, attn_implementation="eager", **norms)
    _, input_ids, mask = batch_of(RAGGED)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected, found = (
        model.model.encoder(input_ids, attention_mask=mask, **wanted) for model in (sequential, by_diagonals)
    )
    assert len(found.hidden_states) == 4
    for ours, theirs in zip(
        found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.each_value
@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
@pytest.mark.parametrize(
    "rates",
    [
        {"dropout": 1.0},
        {"activation_dropout": 1.0},
        {"attention_dropout": 1.0},
        {"hidden_dropout_prob": 1 - 1e-12},
    ],
    ids=str,
)
def test_dropout_stands_where_it_does_in_sequence(make_model, rates, norms):
    """Schedules are comparable at rate 1, which draws no random number."""
    models = [model.train() for model in both(make_model, attn_implementation="eager", **rates, **norms)]
    ids = random_ids(2, 4, 8)
    expected, found = (model.model.encoder(ids) for model in models)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.state.memory, expected.state.memory, rtol=0, atol=1e-10)
    undropped = models[1].eval().model.encoder(ids)
    assert not torch.allclose(undropped.last_hidden_state, found.last_hidden_state)


def test_dropout_differs_by_layer_segment_and_pass(make_model):
    _, model = both(make_model, dropout=0.5)
    ids = random_ids(1, 4, 8)
    first, second = (model.train().model.encoder(ids).last_hidden_state for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("n_segments", "every", "depth", "steps"),
    [(6, False, -1, 8), (6, False, 1, 10), (6, True, 1, 12), (6, False, 0, 7)],
)
def test_it_takes_as_many_steps_as_there_are_diagonals(make_model, monkeypatch, n_segments, every, depth, steps):
    """N segments and 3 layers have N + 2 diagonals.

    Examples: 4 segments without a graph and 2 with one have 6 + 4 diagonals. Three windows of two have 3 * 4.
    5 segments without a graph have 5 + 2. A single last segment runs sequentially.
    """
    calls = []
    step = wavefront.diagonal_step
    monkeypatch.setattr(wavefront, "diagonal_step", lambda *inputs: calls.append(inputs[3]) or step(*inputs))
    _, model = both(make_model, bptt_depth=depth)
    model.model.encoder(random_ids(2, n_segments, 8), decode_at=DECODE_AT[every])
    assert len(calls) == steps
    assert sum(map(len, calls)) == 3 * (n_segments if depth else 5)
    calls.clear()
    with torch.no_grad():
        model.model.encoder(random_ids(2, n_segments, 8), decode_at=DECODE_AT[every])
    assert len(calls) == n_segments + 2


@pytest.mark.parametrize("frozen", ["fc1", "recurrence", "encoder"])
def test_frozen_parameters_stay_without_gradient(make_model, frozen):
    models = both(make_model)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    inputs = {"input_ids": random_ids(2, 4, 8), "labels": random_ids(2, 4)}
    expected, found = (results(model, **inputs) for model in models)
    check_equal(found, expected)
    assert not any(frozen in name for name in found)


def test_a_graph_is_gone_through_twice(make_model):
    """The gradients of slices accumulate in one buffer, which must be new in each backward pass."""
    _, model = both(make_model)
    loss = model(input_ids=random_ids(2, 4, 8), labels=random_ids(2, 4)).loss
    wanted = dict(model.model.encoder.layers.named_parameters())
    once = torch.autograd.grad(loss, wanted.values(), retain_graph=True)
    twice = torch.autograd.grad(loss, wanted.values())
    for name, *pair in zip(wanted, once, twice, strict=True):
        assert torch.equal(*pair), name


def test_spans_of_stacked_weights_are_views_of_one_copy(make_model):
    stacks = stack_layers(make_model().model.encoder.layers)
    storages = {name: weight.untyped_storage().data_ptr() for name, weight in stacks.items()}
    for span in [(0, 1), (0, 3), (1, 3)]:
        for name, weight in slice_weights(stacks, *span).items():
            if isinstance(weight, StackedWeightSlice):
                linear(torch.zeros(span[1] - span[0], 1, stacks[name].shape[1], dtype=torch.float64), weight)
                weight = stacks[name]
            assert weight.untyped_storage().data_ptr() == storages[name]


@pytest.mark.slow
def test_adapters_run_in_sequence_and_it_is_said(make_model, monkeypatch):
    sequential, by_diagonals = both(make_model)
    torch.manual_seed(2)
    for model in (sequential, by_diagonals):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    by_diagonals.load_state_dict(sequential.state_dict())
    said = []
    monkeypatch.setattr(grid_module.logger, "warning_once", said.append)
    monkeypatch.setattr(grid_module, "is_wavefront_faster", lambda segments: True)
    ids = random_ids(2, 3, 8)
    expected, found = (model.model.encoder(ids).last_hidden_state for model in (sequential, by_diagonals))
    assert torch.equal(found, expected)
    assert len(said) == 1
    assert "adapters" in said[0]
    by_diagonals.config.schedule = "auto"
    assert torch.equal(by_diagonals.model.encoder(ids).last_hidden_state, expected)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("fields", "is_faster", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"recurrence": "top"}, True, False),
        # segments without a state run as one batch
        ({"recurrence": "none", "decoder_context": "all"}, True, False),
        ({"schedule": "sequential"}, True, False),
        ({"schedule": "wavefront"}, False, True),
        # only the last segment runs
        ({"pre_seq_len": 0}, True, False),
    ],
)
def test_the_schedule_is_chosen(make_model, monkeypatch, fields, is_faster, expected):
    calls = []
    step = wavefront.diagonal_step
    monkeypatch.setattr(wavefront, "diagonal_step", lambda *inputs: calls.append(inputs) or step(*inputs))
    monkeypatch.setattr(grid_module, "is_wavefront_faster", lambda segments: is_faster)
    make_model(**fields).model.encoder(random_ids(2, 3, 8))
    assert bool(calls) == expected


@pytest.mark.parametrize(
    ("shape", "device", "expected"),
    [
        ((1, 2, 512, 8), "meta", True),
        ((32, 9, 512, 8), "meta", True),
        ((33, 9, 512, 8), "meta", False),
        ((1, 9, 512, 8), "cpu", False),
    ],
)
def test_diagonals_are_for_devices_that_a_layer_does_not_fill(shape, device, expected):
    assert grid_module.is_wavefront_faster(torch.empty(shape, device=device)) == expected


def saved_bytes(model, n_segments):
    """Return the bytes that a forward pass saves for its backward pass."""
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=random_ids(1, n_segments, 8), labels=random_ids(1, 4))
    return total


@pytest.mark.slow
def test_memory_falls_with_the_grain(make_model):
    """One more segment adds the autograd graph of a diagonal, or its streams; recomputed groups keep fewer streams."""
    _, model = both(make_model)
    growth = {}
    for grain in ("none", "layer", "segment"):
        model.train().set_gradient_checkpointing(grain)
        growth[grain] = saved_bytes(model, 120) - saved_bytes(model, 80)
    assert growth["none"] > 4 * growth["layer"]
    assert growth["layer"] > 1.5 * growth["segment"]


@pytest.mark.slow
def test_gradients_of_weights_are_not_kept_until_the_last_diagonal(make_model):
    """One more segment adds far less memory to a step than the weights of its layers."""
    _, model = both(make_model)
    model.train().set_gradient_checkpointing("layer")
    peaks = [peak_bytes(functools.partial(step, model, n_segments), torch.device("cpu")) for n_segments in (10, 50)]
    n_bytes = sum(p.numel() * p.element_size() for p in model.model.encoder.layers.parameters())
    assert (peaks[1] - peaks[0]) / 40 < n_bytes / 2


def step(model, n_segments):
    model(input_ids=random_ids(1, n_segments, 8), labels=random_ids(1, 4)).loss.backward()
    model.zero_grad()


def test_diagonals_recomputed_together_change_no_number(make_model, monkeypatch):
    """8 diagonals run in groups of 3."""
    monkeypatch.setattr(wavefront, "STREAMS_PER_CELL", 1)
    _, model = both(make_model, dropout=0.2, attention_dropout=0.2, hidden_dropout_prob=0.2)
    _, input_ids, mask = batch_of([[8] * 5 + [3], [8, 4]])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": random_ids(2, 4)}
    found = []
    for grain in ("none", "segment"):
        model.train().set_gradient_checkpointing(grain)
        torch.manual_seed(1)
        found.append(results(model, **inputs))
    check_equal(found[1], found[0], tolerance=0)


def test_what_is_kept_of_a_segment_holds_no_other_layers_streams(make_model, monkeypatch):
    _, model = both(make_model, decoder_context="all")
    sizes = []
    append = grid_module.Grid._append

    def weigh(grid, output, segment, *others, **named):
        sizes.append(segment.tokens.untyped_storage().nbytes())
        append(grid, output, segment, *others, **named)

    monkeypatch.setattr(grid_module.Grid, "_append", weigh)
    with torch.no_grad():
        model.model.encoder(random_ids(2, 6, 8))
    assert sizes == [2 * 8 * 16 * 8] * 6


def test_no_segment_before_the_window_keeps_a_graph(make_model):
    _, model = both(make_model, bptt_depth=1)
    assert saved_bytes(model, 3) == saved_bytes(model, 12)


@pytest.mark.slow
def test_the_step_is_compiled_whole_with_equal_numbers(make_model):
    """aot_eager traces forward and backward like other back-ends, and needs no C++ compiler."""
    encoder = make_model().model.encoder
    weights = stack_layers(encoder.layers) | dict(encoder.recurrence.by_layer())
    weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    stream, memory = (torch.randn(3, 2, n, 16, dtype=torch.float64, requires_grad=True) for n in (11, 3))
    found = []
    compiled = torch.compile(wavefront.diagonal_step, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in (wavefront.diagonal_step, compiled):
        visible = wavefront.AttentionMasks(None, None, 3, slots_read_prefix=True)
        out = step(weights, encoder.layers[0], encoder.recurrence, stream, memory, visible, None)
        loss = out[0].sin().sum() + out[1].cos().sum()
        gradients = torch.autograd.grad(loss, [stream, memory, *weights.values()])
        found.append(dict(zip(["loss", "stream", "memory", *weights], [loss, *gradients], strict=True)))
    check_equal(found[1], found[0])
