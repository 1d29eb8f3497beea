"""Fused and captured diagonals, and captured decoders, equal plain ones; run with `pytest -m gpu`."""

import pytest
import torch
from torch import nn

from counted_calls import count_calls
from played_graphs import ORDERS, call_graphed, call_in_order, call_plain
from recurrent_bart.execution import diagonal_graphs, graphed_wavefront, grid, wavefront
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.model import modeling_decoder
from tiny import DIAGONALS, random_ids, tiny_model

pytestmark = pytest.mark.gpu

FIELDS = DIAGONALS | {
    "all": {"decoder_context": "all"},
    "pre-norm without gate": {"normalize_before": True, "update_gate": False, "bptt_depth": 1},
}
SHAPE = {"d_model": 48, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_layers": 3}
# TINY's larger weights would raise the float32 rounding error of this wider model to the tolerance of the checks
SHAPE |= {"init_std": 0.15}


def build(schedule, seed=0, **fields):
    torch.manual_seed(seed)
    model = tiny_model(schedule=schedule, activation_function="gelu", **SHAPE | fields).to("cuda").float().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.normal_()
    return model


def documents(is_ragged, task="document"):
    torch.manual_seed(1)
    mask = torch.ones(3, 5, 8, dtype=torch.long)
    if is_ragged:
        mask[1, 3:], mask[1, 2, 5:], mask[2, 1:] = 0, 0, 0
    labels = random_ids(3, 5, 4)
    labels[~mask.bool().any(-1)] = -100
    labels = labels if task == "sections" else labels[:, 0]
    return {"input_ids": random_ids(3, 5, 8).cuda(), "attention_mask": mask, "labels": labels}


def results(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output.state.memory.detach(), gradients


def check_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        gap = float((found[2][name] - gradient).abs().max())
        assert gap < 1e-4 * float(gradient.abs().max()) + 1e-5 * scale, f"{name}: {gap}"


@pytest.fixture
def replays(monkeypatch):
    return count_calls(monkeypatch, diagonal_graphs.DiagonalGraphs, "replay")


@pytest.fixture
def decoded(monkeypatch):
    """Count replayed decoder passes."""
    return count_calls(monkeypatch, modeling_decoder, "call_graphed")


@pytest.fixture
def fused(monkeypatch):
    return count_calls(monkeypatch, wavefront, "fused_cell")


@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("schedule", ["wavefront", "auto"])
def test_numbers_are_the_sequential_ones(schedule, fields, is_ragged, task, replays, fused, decoded):
    inputs = documents(is_ragged, task)
    expected = results(build("sequential", **fields), inputs)
    model = build(schedule, **fields)
    # the second step replays graphs that were captured with other weights
    if schedule == "auto":
        with torch.no_grad():
            weights = [parameter.clone() for parameter in model.parameters()]
            torch._foreach_mul_(list(model.parameters()), 0.5)
        results(model, inputs)
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), weights)
    check_equal(results(model, inputs), expected)
    check_equal(results(model, inputs), expected)
    assert fused
    assert bool(replays) == bool(decoded) == (schedule == "auto")


@pytest.mark.parametrize("is_ragged", [False, True])
def test_reading_gives_the_sequential_states(is_ragged, replays):
    inputs = documents(is_ragged)
    inputs.pop("labels")
    read = [build(schedule).eval().model.encode(**inputs) for schedule in ("sequential", "auto") for _ in range(2)]
    n_before, model = len(replays), build("auto").eval()
    with torch.inference_mode():
        read += [model.model.encode(**inputs), model.model.encode(**inputs)]
    for found in read[1:]:
        torch.testing.assert_close(found.last_hidden_state, read[0].last_hidden_state, rtol=1e-4, atol=1e-5)
    # the second call replays
    assert len(replays) > n_before


def test_many_segments_are_read_by_one_recording(monkeypatch):
    calls = count_calls(monkeypatch, diagonal_graphs.DiagonalGraphs, "read_together")
    torch.manual_seed(2)
    ids, models = random_ids(3, 56, 8).cuda(), [build(schedule).eval() for schedule in ("auto", "sequential")]
    for _ in range(4):
        with torch.inference_mode():
            found, expected = (model.model.encode(ids) for model in models)
        torch.testing.assert_close(found.state.memory, expected.state.memory, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    # from the second call on; of 56 segments, two groups of 16 diagonals have all layers
    assert len(calls) == 3 * 2


@pytest.mark.parametrize("n_bytes", [420_000, 2**40])
@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_what_is_kept_is_what_would_be_computed_again(n_bytes, is_ragged, order, replays, monkeypatch):
    """Dropout is on. Recomputed diagonals, other passes and readings come in between."""
    monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device: n_bytes / graphed_wavefront.MOST_RETAINED)
    found = []
    for checkpointing in ("none", "layer"):
        model, inputs = build("auto", dropout=0.3, hidden_dropout_prob=0.3), documents(is_ragged)
        model.set_gradient_checkpointing(checkpointing)
        results(model, inputs)
        model.zero_grad()
        torch.manual_seed(3)
        losses = []
        for _ in range(2):
            losses.append(model(**inputs).loss)
            with torch.no_grad():
                model(**inputs)
        for number in order:
            losses[number].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses).detach(), torch.zeros(()), gradients))
    check_equal(*found)
    (recorder,) = graph_store(model.model.encoder.recurrence).graphs.values()
    # the recorder of the second model
    assert not recorder.retained.n_bytes


def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    """5 segments and 3 layers have 7 diagonals."""
    kept = []
    for n_bytes in (0, 2**40):
        monkeypatch.setattr(graphed_wavefront, "memory_bytes", lambda device, n_bytes=n_bytes: n_bytes)
        model = build("auto")
        results(model, documents(False))
        (recorder,) = graph_store(model.model.encoder.recurrence).graphs.values()
        kept.append(len(recorder.retained._retained))
    assert kept == [0, 7]


def test_the_same_dropout_is_drawn_again_in_the_backward_pass(replays):
    """The gradient equals the loss's slope along it under the same dropout masks."""
    model, inputs = build("auto", dropout=0.3, hidden_dropout_prob=0.3, attention_dropout=0.0), documents(False)
    parameters = list(model.parameters())

    def loss():
        torch.manual_seed(3)
        return model(**inputs).loss

    results(model, inputs)
    gradients = torch.autograd.grad(loss(), parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    # a small step, in which the loss is linear
    step = 1e-4 / norm
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=float(sign * step))
        # with an autograd graph, because other random numbers are drawn without one
        found.append(float(loss().detach()))
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=float(-sign * step))
    assert (found[0] - found[1]) / (2 * float(step)) == pytest.approx(float(norm) ** 2, rel=2e-2)
    assert replays


def test_recording_leaves_the_random_numbers_as_they_are():
    model, inputs = build("auto", dropout=0.3), documents(False)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(float(model(**inputs).loss.detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("grain", ["none", "layer", "segment"])
def test_a_step_of_an_optimizer_is_seen_by_replays(grain, replays, decoded):
    """Weights change in place, and gradients of two passes accumulate."""
    inputs, losses = documents(True), []
    for schedule in ("sequential", "auto"):
        model = build(schedule)
        model.set_gradient_checkpointing(grain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            for _ in range(2):
                loss = model(**inputs).loss
                loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    assert replays
    assert decoded


def test_a_module_that_somebody_listens_to_is_not_replayed(decoded):
    model, heard = build("auto"), []
    model.model.decoder.layers[0].register_forward_hook(lambda *_: heard.append(1))
    results(model, documents(False))
    assert heard
    assert not decoded


@pytest.mark.parametrize(("order", "n_replays"), ORDERS.values(), ids=ORDERS)
def test_recorded_calls_in_any_order_are_exact_and_computed_again_only_where_they_must_be(
    order, n_replays, monkeypatch
):
    """Random numbers of dropout are compared, too."""
    expected = call_in_order(call_plain, order, "cuda")
    counted = count_calls(monkeypatch, torch.cuda.CUDAGraph, "replay")
    torch.testing.assert_close(call_in_order(call_graphed, order, "cuda"), expected, rtol=0, atol=1e-12)
    assert len(counted) == n_replays


LENGTHS = pytest.mark.parametrize("lengths", [(32, 32), (32, 64)], ids=["of one shape", "of two shapes"])


def decoded_twice(lengths, decode, is_interleaved, **fields):
    """Return outputs and gradients of two decoder passes, the second time they run."""
    decoder = build("auto", dropout=0.3, **fields).model.decoder
    hidden = torch.randn(2, 9, 48, device="cuda").requires_grad_()
    for _ in range(2):
        decoder.zero_grad()
        hidden.grad = None
        torch.manual_seed(2)
        # drawn before the first pass, because kernel launches also draw random numbers of the host
        inputs, out = [random_ids(2, length).cuda() for length in lengths], []
        for ids in inputs:
            out.append(decode(decoder, ids, hidden))
            if not is_interleaved:
                out[-1].square().mean().backward()
        if is_interleaved:
            for part in out:
                part.square().mean().backward()
    return [part.detach() for part in out] + [part.grad for part in (hidden, *decoder.parameters())]


def decode_plain(decoder, ids, hidden):
    return decoder._plain(3, decoder.embed_tokens(ids), hidden)


def decode_recorded(decoder, ids, hidden):
    return decoder._recorded([decoder.embed_tokens(ids), hidden], 3)


def check_each(found, expected):
    for again, part in zip(found, expected, strict=True):
        torch.testing.assert_close(again, part, rtol=1e-4, atol=1e-5)


@LENGTHS
def test_decoders_of_two_passes_draw_the_numbers_of_plain_ones(lengths):
    expected = decoded_twice(lengths, decode_plain, True)
    check_each(decoded_twice(lengths, decode_recorded, True), expected)


@LENGTHS
def test_attention_drops_the_same_when_a_decoder_is_computed_again(lengths):
    """Dropped weights differ from a run without capture, because back-ends draw differently during capture."""
    usual, late = (decoded_twice(lengths, decode_recorded, late, attention_dropout=0.3) for late in (False, True))
    check_each(late, usual)


@pytest.mark.parametrize("task", ["document", "sections"])
def test_losses_of_two_passes_are_added_before_they_are_differentiated(task, decoded):
    found, batches = [], [documents(False, task), documents(True, task)]
    for schedule in ("sequential", "auto"):
        model = build(schedule)
        outputs = [model(**inputs) for inputs in (*batches, batches[0])]
        loss = sum(output.loss for output in outputs)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), outputs[1].state.memory.detach(), gradients))
    check_equal(found[1], found[0])
    assert decoded


def test_the_most_targets_are_recorded(decoded):
    """Above 3,072 targets, PyTorch accumulates an embedding's gradient with other kernels."""
    inputs = {"input_ids": random_ids(64, 2, 8).cuda(), "labels": random_ids(64, 60).cuda()}
    expected, model = results(build("sequential"), inputs), build("auto")
    check_equal(results(model, inputs), expected)
    check_equal(results(model, inputs), expected)
    assert modeling_decoder.MOST_TARGETS == 64 * 64
    assert len(decoded) == 2


def test_recordings_of_other_shapes_take_no_memory_of_their_own():
    width, n_layers = 1024, 8
    hidden = [part for _ in range(n_layers) for part in (nn.Linear(width, width), nn.GELU())]
    module = nn.Sequential(nn.Linear(8, width), *hidden, nn.Linear(width, 8)).cuda()

    def bytes_after(n_rows):
        call_graphed(module, torch.randn(n_rows, 8, device="cuda")).sum().backward()
        module.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    # the second call allocates nothing for the first time
    bytes_after(4096)
    allocated, reserved = bytes_after(4096)
    found = [bytes_after(n_rows) for n_rows in range(4096 - 128, 2048, -128)]
    assert found[-1][0] - allocated < 2**23
    # half the activations of one call, which all graphs share in the pool; 15 more graphs were captured
    assert found[-1][1] - reserved < 2 * n_layers * 4096 * width * 4 // 2


def test_large_batches_are_not_recorded(monkeypatch, replays):
    monkeypatch.setattr(graphed_wavefront, "MOST_TOKENS", 3 * 8 - 1)
    results(build("auto"), documents(False))
    assert not replays
    assert grid.is_wavefront_faster(torch.zeros(3, 5, 8, 48, device="cuda"))


def of_layers(change):
    """Change all layers of the encoder and of the decoder."""
    return lambda model: [change(layer) for part in (model.model.encoder, model.model.decoder) for layer in part.layers]


# changes of a model between two steps that its outputs show; dropout at rate 1 draws no random number
CHANGES = {
    "dropout": (of_layers(lambda layer: setattr(layer, "dropout", 0.0)), {"dropout": 1.0}),
    "eval() of the layers": (of_layers(nn.Module.eval), {"activation_dropout": 1.0}),
    "eval() of prefix dropout": (
        lambda model: model.model.encoder.recurrence.dropout.eval(),
        {"hidden_dropout_prob": 1 - 1e-7},
    ),
    "activation": (of_layers(lambda layer: setattr(layer, "activation_fn", nn.Tanh())), {}),
    "activation of one layer": (
        lambda model: setattr(model.model.encoder.layers[1], "activation_fn", nn.Tanh()),
        {},
    ),
    "epsilon": (of_layers(lambda layer: setattr(layer.final_layer_norm, "eps", 0.5)), {}),
    "one layer's activation in the decoder": (
        lambda model: setattr(model.model.decoder.layers[1], "activation_fn", nn.Tanh()),
        {},
    ),
}


@pytest.mark.parametrize(("change", "fields"), CHANGES.values(), ids=CHANGES)
def test_graphs_do_not_go_on_with_settings_that_were_changed(change, fields, replays, decoded):
    inputs, model = documents(True), build("auto", **fields)
    before = results(model, inputs)[0]
    results(model, inputs)
    change(model)
    found = results(model, inputs)
    plain = build("sequential", **fields)
    change(plain)
    check_equal(found, results(plain, inputs))
    check_equal(results(model, inputs), found)
    assert abs(float(found[0] - before)) > 1e-3
    assert replays
    assert decoded


def test_a_backward_pass_has_the_settings_of_its_forward_pass(replays):
    """The layers are set to evaluation mode in between."""
    found = []
    for schedule in ("sequential", "auto"):
        model, inputs = build(schedule, activation_dropout=1.0), documents(False)
        loss = model(**inputs).loss
        model.eval()
        model(**inputs)
        loss.backward()
        found.append((loss.detach(), torch.zeros(()), {name: p.grad for name, p in model.named_parameters()}))
    check_equal(found[1], found[0])
    assert replays


def test_another_attention_implementation_is_captured_anew(replays, monkeypatch):
    """Its masks have another form."""
    inputs, model = documents(True), build("auto", attn_implementation="eager")
    expected = results(model, inputs)
    model.set_attn_implementation("sdpa")
    captures = count_calls(monkeypatch, diagonal_graphs, "warm_up_and_capture")
    check_equal(results(model, inputs), expected)
    assert captures
    assert replays


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("schedule", ["wavefront", "auto"])
def test_a_model_on_another_device_than_the_current_one_computes_there(schedule, fused):
    inputs = documents(True)
    expected = results(build("sequential"), inputs)
    model = build(schedule)
    results(model, inputs)
    model.to("cuda:1")
    there = {name: value.to("cuda:1") if value.is_cuda else value for name, value in inputs.items()}
    assert torch.cuda.current_device() == 0
    for _ in range(2):
        loss, state, gradients = results(model, there)
        gradients = {name: gradient.to("cuda:0") for name, gradient in gradients.items()}
        check_equal((loss.to("cuda:0"), state.to("cuda:0"), gradients), expected)
    assert fused
