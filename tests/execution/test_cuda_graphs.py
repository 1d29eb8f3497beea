"""A decoder with CUDA graphs equals a plain decoder; on a CPU, replaying a graph runs the captured function."""

import contextlib
import copy
import functools
import gc
import pickle
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers.models.bart import modeling_bart

from counted_calls import count_calls
from played_graphs import ORDERS, PlayedGraph, call_graphed, call_in_order, call_plain, play_graphs
from recurrent_bart.execution import cuda_graphs, graphed_wavefront
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.model import modeling_decoder
from recurrent_bart.model.decoder_attention import CrossAttention
from tiny import random_ids, tiny_model, two_steps


@pytest.fixture
def graphs(monkeypatch):
    """Capture on a CPU; return the growing list of graphs."""
    made = play_graphs(monkeypatch, cuda_graphs)
    monkeypatch.setattr(modeling_decoder, "can_capture", lambda module, inputs: torch.is_grad_enabled())
    return made


def losses_and_gradients(schedule, task):
    """Return losses and gradients of two steps."""
    torch.manual_seed(0)
    model = tiny_model(schedule=schedule).double().train()
    return two_steps(model, [[8, 8, 3], [5], [8, 2]], task)


@pytest.mark.parametrize("task", ["document", "sections"])
def test_numbers_are_those_of_a_plain_decoder(graphs, task):
    expected = losses_and_gradients("sequential", task)
    assert not graphs
    torch.testing.assert_close(losses_and_gradients("auto", task), expected, rtol=0, atol=1e-12)
    # one forward and one backward graph serve both steps
    assert len(graphs) == 2


@pytest.mark.parametrize(("order", "n_replays"), ORDERS.values(), ids=ORDERS)
def test_calls_in_any_order_are_exact_and_computed_again_only_where_they_must_be(graphs, order, n_replays, monkeypatch):
    """Random numbers of dropout are compared, too."""
    expected = call_in_order(call_plain, order, "cpu")
    replays = count_calls(monkeypatch, PlayedGraph, "replay")
    torch.testing.assert_close(call_in_order(call_graphed, order, "cpu"), expected, rtol=0, atol=1e-12)
    assert len(replays) == n_replays


@pytest.mark.parametrize("lengths", [(4, 4), (4, 40)], ids=["of one shape", "of two shapes"])
def test_losses_of_two_passes_are_added_before_they_are_differentiated(graphs, lengths):
    found = []
    for schedule in ("sequential", "auto"):
        torch.manual_seed(0)
        model = tiny_model(schedule=schedule).double().train()
        losses = [model(input_ids=random_ids(2, 2, 8), labels=random_ids(2, length)).loss for length in lengths]
        sum(losses).backward()
        found.append([*(loss.detach() for loss in losses), *(parameter.grad for parameter in model.parameters())])
    assert graphs
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_recordings_of_other_shapes_take_no_memory_of_their_own(graphs, make_model):
    """Smaller shapes use the buffers of the largest shape, which is captured first."""
    model = make_model(schedule="auto").train()
    places = set()
    for n_documents in (3, 2, 1):
        model(input_ids=random_ids(n_documents, 2, 8), labels=random_ids(n_documents, 4)).loss.backward()
        *_, call = graph_store(model.model.decoder).graphs[cuda_graphs.GraphedModule].calls.values()
        places.add(tuple(part.data_ptr() for part in (*call.inputs, *call.gradients, call.out, call.output_gradient)))
    assert len(graphs) == 6
    assert len(places) == 1


def test_lengths_share_recordings_and_the_oldest_are_forgotten(graphs, make_model, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_SHAPES", 2)
    model = make_model(schedule="auto").train()

    def step(n_documents, n_targets):
        labels = random_ids(n_documents, n_targets)
        model(input_ids=random_ids(n_documents, 2, 8), labels=labels).loss.backward()
        return len(graphs) // 2

    assert [step(1, length) for length in (2, 7, 32, 33, 40)] == [1, 1, 1, 2, 2]
    assert [step(2, 7), step(1, 40), step(1, 7), step(2, 7)] == [3, 3, 4, 5]


def test_a_checkpointed_decoder_keeps_less(graphs, make_model, monkeypatch):
    monkeypatch.setattr(modeling_decoder, "MOST_CHECKPOINTED_TARGETS", 64)
    model = make_model(schedule="auto").train()
    model.set_gradient_checkpointing("layer")
    for n_documents, n_recordings in ((2, 2), (3, 2)):
        model(input_ids=random_ids(n_documents, 2, 8), labels=random_ids(n_documents, 4))
        assert len(graphs) == n_recordings
    model.set_gradient_checkpointing("none")
    model(input_ids=random_ids(3, 2, 8), labels=random_ids(3, 4))
    assert len(graphs) == 4


def test_longer_targets_than_there_are_positions_are_refused_as_ever(graphs, make_model):
    with pytest.raises((IndexError, ValueError)):
        make_model(schedule="auto").train()(input_ids=random_ids(1, 2, 8), labels=random_ids(1, 70))
    assert not graphs


def test_parameters_that_moved_or_were_frozen_are_recorded_anew(graphs, make_model):
    model, inputs = make_model(schedule="auto").train(), {"input_ids": random_ids(1, 2, 8), "labels": random_ids(1, 4)}
    model(**inputs).loss.backward()
    layer = model.model.decoder.layers[0].fc1
    layer.weight.data = layer.weight.data.clone()
    model(**inputs).loss.backward()
    assert len(graphs) == 4
    layer.weight.requires_grad_(False).grad = None
    model(**inputs).loss.backward()
    assert len(graphs) == 6
    assert layer.weight.grad is None


def test_what_asks_for_more_than_states_is_not_recorded(graphs, make_model):
    model, inputs = make_model(schedule="auto"), {"input_ids": random_ids(1, 2, 8), "labels": random_ids(1, 4)}
    assert model(**inputs, output_hidden_states=True).decoder_hidden_states
    with torch.no_grad():
        model(**inputs)
    assert not graphs


def test_layers_are_dropped_anew_each_time(graphs, make_model):
    model = make_model(schedule="auto", decoder_layers=4, decoder_layerdrop=0.5).train()
    inputs = {"input_ids": random_ids(1, 2, 8), "labels": random_ids(1, 4)}
    assert len({model(**inputs).loss.item() for _ in range(12)}) > 2
    assert not graphs
    # no layer is dropped in evaluation mode
    model.eval()(**inputs)
    assert graphs


def test_a_processor_records_nothing(make_model):
    model = make_model(schedule="auto")
    assert not cuda_graphs.can_capture(model.model.decoder, [torch.zeros(1)])


def test_no_garbage_is_collected_while_work_is_recorded(monkeypatch, notes):
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture(notes))
    is_collected, _ = cuda_graphs.capture(gc.isenabled, stream=None)
    assert not is_collected
    assert gc.isenabled()


@pytest.mark.slow
def test_graphs_belong_to_one_module(graphs, make_model):
    """A copy, a pickled model and a model that is deleted have no graphs of another one."""
    model = make_model(schedule="auto").train()
    model(input_ids=random_ids(2, 2, 8), labels=random_ids(2, 4)).loss.backward()
    parts = (model.model.decoder, model.model.encoder.recurrence)
    assert graph_store(parts[0]).graphs
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert not graph_store(other.model.decoder).graphs
        assert graph_store(other.model.decoder).user is not graph_store(parts[0]).user
    reference = weakref.ref(graph_store(parts[0]).graphs[cuda_graphs.GraphedModule])
    graphs.clear()
    del model, parts
    gc.collect()
    assert reference() is None


def test_replicas_of_data_parallel_are_not_captured(monkeypatch, make_model):
    """A replica has no parameters; its weights change with each call, which a graph would not see."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    decoder = make_model().model.decoder
    inputs = [SimpleNamespace(is_cuda=True, requires_grad=True, device=torch.device("cpu"))]
    assert cuda_graphs.can_capture(decoder, inputs)
    replica = copy.copy(decoder)
    replica._parameters, replica._modules = {}, {}
    assert not cuda_graphs.can_capture(replica, inputs)


def test_a_wavefront_of_a_replica_has_no_graphs(monkeypatch, make_model):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphed_wavefront, "can_fuse", lambda layer, tokens: True)
    layer = make_model().model.encoder.layers[0]
    for is_replica in (False, True):
        layer._is_replica = is_replica
        assert graphed_wavefront.can_graph(layer, {}, torch.zeros(1, 8, 16), "none") != is_replica


class FakeCapture:
    """Stand-in for `torch.cuda.graph`, which notes what happens in what order."""

    def __init__(self, notes, fails=False):
        self.notes, self.fails = notes, fails

    def __call__(self, graph, **how):
        return self

    def __enter__(self):
        self.notes.append("begin")

    def __exit__(self, *error):
        self.notes.append("end")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def notes(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", found.append)
    clear = functools.partial(found.append, "clear")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    return found


def test_a_graph_holds_its_own_workspace(monkeypatch, notes):
    """PyTorch frees the workspace of a stream with each of its graphs."""
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture(notes))
    assert cuda_graphs.capture(lambda: notes.append("work") or 5, "stream")[0] == 5
    assert notes == ["clear", "begin", "work", "end", "clear"]


def test_a_failed_capture_leaves_the_current_stream(monkeypatch, notes):
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture(notes, fails=True))
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graphs.capture(lambda: 5, "stream")
    assert notes == ["clear", "begin", "end", "stream before", "clear"]
    assert gc.isenabled()


def test_one_thread_captures_at_a_time(monkeypatch, notes):
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture(notes))
    threads = [
        threading.Thread(target=cuda_graphs.capture, args=(lambda: time.sleep(0.05), "stream")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notes == ["clear", "begin", "end", "clear"] * 3


def test_streams_are_joined_after_a_warm_up_that_fails(monkeypatch):
    waits = []
    names = "side", "current"
    stream, current = (
        SimpleNamespace(wait_stream=lambda other, name=name: waits.append((name, other))) for name in names
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: contextlib.nullcontext())
    with pytest.raises(ZeroDivisionError):
        cuda_graphs.warm_up([lambda: 1 / 0], stream)
    assert waits == [("side", current), ("current", stream)]


def test_a_decoder_without_padding_uses_no_mask_of_its_context(monkeypatch):
    """During a capture, transformers before 5.18 builds a mask that hides nothing."""
    model, seen = tiny_model(decoder_context="all").eval(), []
    monkeypatch.setattr(modeling_bart, "create_bidirectional_mask", lambda *args, **kwargs: torch.zeros(1, 1, 1, 1))
    read = CrossAttention._read
    monkeypatch.setattr(
        CrossAttention, "_read", lambda self, q, kv, mask, n: seen.append(mask) or read(self, q, kv, mask, n)
    )
    embeds, hidden = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    model.model.decoder._plain(None, embeds, hidden)
    assert seen
    assert all(mask is None for mask in seen)
    seen.clear()
    model.model.decoder._plain(None, embeds, hidden, torch.zeros(2, 1, 1, 9))
    assert all(mask is not None for mask in seen)
