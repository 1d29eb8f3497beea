"""Tests of generation by CUDA graphs, which `played_graphs` plays on the CPU."""

import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from generation_options import count_loops, documents, generate, random_case
from played_graphs import play_graphs
from recurrent_bart.execution.graph_guards import graph_store
from recurrent_bart.model.decoding import fast_generation, session, session_store
from recurrent_bart.model.decoding.cached_decoder import CachedDecoder
from recurrent_bart.model.decoding.search import draw_unchecked

# a graph of the step with the choice of the token, and a graph without it
KINDS = {
    "greedy": {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 9},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "processor of Hugging Face": {"bad_words_ids": [[5, 6]]},
}


@pytest.fixture
def graphs(monkeypatch):
    """Let all batches be captured, and return the growing list of graphs."""
    monkeypatch.setattr(fast_generation.Batch, "can_capture", True)
    return play_graphs(monkeypatch, session)


def sessions_of(model):
    return graph_store(model).graphs[session_store.SessionStore][1].sessions


@pytest.mark.parametrize("seeds", [range(300, 305), pytest.param(range(305, 316), marks=pytest.mark.slow)], ids=str)
@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_graphs_give_hugging_faces_ids(monkeypatch, graphs, seeds):
    calls = count_loops(monkeypatch)
    for seed in seeds:
        model, inputs, how = random_case(seed, 1 + seed % 4)
        found = generate(model, inputs, how)
        assert not calls
        assert torch.equal(found, generate(model, inputs, how, fast=False)), how
        calls.clear()
    assert len(graphs) >= len(seeds)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_one_capture_serves_many_batches_and_trained_weights(make_model, graphs, how):
    model = make_model().float()
    how = how | {"max_new_tokens": 10}
    for step in range(2):
        inputs = documents(step, 2)
        assert torch.equal(generate(model, inputs, how), generate(model, inputs, how, fast=False))
        # without a change of the version, as DeepSpeed updates weights
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
    assert len(graphs) == 1


def test_long_texts_have_a_graph_for_each_power_of_two(make_model, graphs):
    model = make_model(max_position_embeddings=200).float()
    how = {"max_new_tokens": 140, "eos_token_id": None, "forced_eos_token_id": None, "num_beams": 2}
    inputs = documents(0, 2)
    found = generate(model, inputs, how)
    assert len(graphs) == 3
    assert torch.equal(found, generate(model, inputs, how, fast=False))


def test_the_end_is_checked_every_few_tokens(make_model, graphs, monkeypatch):
    model = make_model().float()
    checks = []
    is_done = session.TokenSearch.is_done
    monkeypatch.setattr(session.TokenSearch, "is_done", lambda self: checks.append(1) or is_done(self))
    how = {"max_new_tokens": 40, "eos_token_id": list(range(60)), "forced_eos_token_id": None}
    found = generate(model, documents(0, 3), how)
    assert torch.equal(found, generate(model, documents(0, 3), how, fast=False))
    assert found.shape[1] < 16
    assert len(checks) == 1


def test_moved_weights_and_other_settings_are_captured_anew(make_model, graphs):
    model, inputs = make_model().float(), documents(0, 2)
    generate(model, inputs, {"max_new_tokens": 5})
    generate(model, inputs, {"max_new_tokens": 5, "min_new_tokens": 3})
    assert len(graphs) == len(sessions_of(model)) == 2
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() * -1)
    found = generate(model, inputs, {"max_new_tokens": 5})
    assert len(sessions_of(model)) == 1
    assert torch.equal(found, generate(model, inputs, {"max_new_tokens": 5}, fast=False))


def test_graphs_of_training_change_no_key(make_model, graphs):
    model, inputs = make_model().float(), documents(0, 2)
    generate(model, inputs, {"max_new_tokens": 5})
    graph_store(model.model.decoder)
    generate(model, inputs, {"max_new_tokens": 5})
    assert len(graphs) == 1


def test_few_sessions_are_kept(make_model, graphs, monkeypatch):
    model = make_model().float()
    for n_documents in range(1, 6):
        for n_new in (3, 4):
            generate(model, documents(0, n_documents), {"max_new_tokens": n_new})
    assert len(sessions_of(model)) == session_store.MOST_SESSIONS
    monkeypatch.setattr(session_store, "LARGEST_PART", 0)
    generate(model, documents(0, 2), {"max_new_tokens": 3})
    assert not sessions_of(model)


def test_copied_weights_and_texts_count_as_kept_memory(make_model, graphs):
    model = make_model().float()
    generate(model, documents(0, 2), {"max_new_tokens": 3})
    (found,) = sessions_of(model).values()
    layers, width = model.config.decoder_layers, model.config.d_model
    weights = layers * 3 * (width * width + width) * 4
    caches = sum(part.nbytes for layer in found.decoder.layers for part in (layer.own_kv, layer.context_kv))
    assert found.n_bytes() == caches + weights + sum(part.nbytes for part in found.search.state())


def test_sessions_can_be_dropped(make_model, graphs):
    model, inputs, how = make_model().float(), documents(0, 2), {"max_new_tokens": 3}
    expected = generate(model, inputs, how)
    session_store.drop_sessions(model)
    session_store.drop_sessions(model)
    assert not sessions_of(model)
    assert torch.equal(generate(model, inputs, how), expected)


@pytest.mark.each_value
@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("n_captures", "kind"), [(0, RuntimeError), (1, torch.OutOfMemoryError)])
def test_steps_run_eagerly_after_a_capture_that_failed(make_model, graphs, monkeypatch, caplog, how, n_captures, kind):
    capture, calls = session.capture, []

    def fail(*given):
        calls.append(given)
        if len(calls) > n_captures:
            given[0]()
            raise kind("operation not permitted when stream is capturing")
        return capture(*given)

    monkeypatch.setattr(session, "capture", fail)
    session.logger.warning_once.cache_clear()
    # on a GPU, memory that is short in a capture is enough outside
    model, inputs = make_model(max_position_embeddings=200).float(), documents(0, 2)
    # the second graph is of texts of more than 64 tokens
    n_tokens = 70 if n_captures else 12
    how = how | {"max_new_tokens": n_tokens, "eos_token_id": None, "forced_eos_token_id": None}
    found = generate(model, inputs, how)
    assert len(calls) == n_captures + 1
    assert caplog.text.count("steps run without CUDA graphs") == 1
    assert torch.equal(found, generate(model, inputs, how, fast=False))


def test_without_memory_other_sessions_are_dropped_first(make_model, graphs, monkeypatch):
    model, how = make_model().float(), {"max_new_tokens": 5}
    generate(model, documents(0, 2), how)
    load, errors = CachedDecoder.load, [torch.OutOfMemoryError("full")]

    def fail_once(*given):
        if errors:
            raise errors.pop()
        return load(*given)

    monkeypatch.setattr(CachedDecoder, "load", fail_once)
    inputs = documents(0, 3)
    assert torch.equal(generate(model, inputs, how), generate(model, inputs, how, fast=False))
    assert len(sessions_of(model)) == 1
    errors += [torch.OutOfMemoryError("full")] * 2
    with pytest.raises(torch.OutOfMemoryError, match="lower the batch size"):
        generate(model, documents(0, 4), how)


def test_a_second_thread_generates_without_graphs(make_model, graphs):
    model, inputs, how = make_model().float(), documents(0, 2), {"max_new_tokens": 6}
    expected = generate(model, inputs, how)
    n_graphs, found = len(graphs), []
    with session_store.session_store(model).reserved() as is_free:
        assert is_free
        thread = threading.Thread(target=lambda: found.append(generate(model, inputs, how | {"min_length": 1})))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert len(graphs) == n_graphs


def test_inference_mode_and_later_calls_share_sessions(make_model, graphs):
    model, inputs, how = make_model().float(), documents(0, 2), {"max_new_tokens": 6, "num_beams": 2}
    with torch.inference_mode():
        first = generate(model, inputs, how)
    assert torch.equal(generate(model, inputs, how), first)
    assert len(graphs) == 1


def test_sizes_are_rounded_up_little():
    for n in range(1, 3000):
        assert n <= session_store.rounded_rows(n) <= max(n + 7, 1.25 * n)
        assert n <= session_store.rounded_context(n) <= max(n + 63, 1.125 * n)
    assert len({session_store.rounded_rows(n) for n in range(1, 129)}) <= 24
    assert len({session_store.rounded_context(n) for n in range(1, 16_385)}) <= 48


def test_unchecked_draws_are_pytorchs():
    probabilities = torch.rand(7, 50).softmax(-1)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(probabilities, 1).squeeze(1)
        torch.manual_seed(seed)
        assert torch.equal(draw_unchecked(probabilities), expected)


class Growing(LogitsProcessor):
    """Processor with a state: each step adds more to token 7. It asserts that it sees the batch's rows alone."""

    def __init__(self, n_rows):
        self.n_rows, self.n_calls, self.seen = n_rows, 0, []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == self.n_rows
        self.n_calls += 1
        self.seen.append(scores)
        scores = scores.clone()
        scores[:, 7] += 3.0 * self.n_calls
        return scores


def test_processors_with_a_state_are_those_of_the_call_and_see_no_additional_rows(make_model, graphs):
    model, inputs = make_model().float(), documents(0, 9)
    for _ in range(2):
        made = [Growing(9), Growing(9)]
        how = [{"max_new_tokens": 6, "logits_processor": LogitsProcessorList([part])} for part in made]
        found, expected = generate(model, inputs, how[0]), generate(model, inputs, how[1], fast=False)
        assert torch.equal(found, expected)
        # the scores of each step stay what they were
        assert all(torch.allclose(*both, atol=1e-4) for both in zip(made[0].seen, made[1].seen, strict=True))
    assert len(graphs) == 1


def test_a_streamer_sees_no_additional_rows(make_model, graphs):
    class Rows(BaseStreamer):
        def __init__(self):
            self.shapes = []

        def put(self, value):
            self.shapes.append(len(value))

        def end(self):
            pass

    streamer = Rows()
    generate(make_model().float(), documents(0, 9), {"max_new_tokens": 4}, streamer=streamer)
    assert graphs
    assert {*streamer.shapes} == {9}


def test_a_model_on_another_device_gets_a_new_store(make_model, graphs):
    model = make_model()
    store = session_store.session_store(model)
    assert session_store.session_store(model) is store
    store.device = torch.device("cuda", 1)
    assert session_store.session_store(model) is not store
