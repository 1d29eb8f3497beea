"""Tests of what needs Hugging Face's own loop, and of the limits of the fast one."""

import logging

import peft
import pytest
import torch
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from generation_options import count_loops, documents, generate
from recurrent_bart.model.decoding import fast_generation, session
from recurrent_bart.model.decoding.stopping import StopWhen
from tiny import random_ids

# options, and the name in the message
UNCOVERED = {
    "return_dict_in_generate": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    "use_cache": ({"use_cache": False}, "use_cache=False"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "max_time": ({"max_time": 60.0}, "MaxTimeCriteria"),
    "criteria": ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)])}, "MaxTimeCriteria"),
    "attention mask": ({"decoder_attention_mask": torch.ones(3, 1).long()}, "decoder_attention_mask"),
    "synced": ({"synced_gpus": True}, "synced_gpus"),
    "length": ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(3)])}, "MaxLengthCriteria"),
    "end": ({"stopping_criteria": StoppingCriteriaList([EosTokenCriteria([7, 8])])}, "EosTokenCriteria"),
}


@pytest.fixture
def messages(monkeypatch):
    """Return a growing list of the messages that are shown once."""
    found = []
    for name in ("info_once", "warning_once"):
        monkeypatch.setattr(fast_generation.logger, name, lambda text: found.append(text))
    return found


@pytest.fixture
def calls(monkeypatch):
    """Return a growing list of the calls of Hugging Face's loops."""
    return count_loops(monkeypatch)


@pytest.mark.parametrize(("how", "name"), UNCOVERED.values(), ids=UNCOVERED)
def test_uncovered_options_run_hugging_faces_loop_and_say_so(make_model, messages, calls, monkeypatch, how, name):
    if name == "synced_gpus":
        # a single process has no group to ask
        monkeypatch.setattr("transformers.GenerationMixin._has_unfinished_sequences", lambda *a, **k: not a[1])
    model = make_model()
    generate(model, documents(0, 3), how | {"max_new_tokens": 4})
    assert calls == ["_sample"]
    assert [name in message for message in messages] == [True]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_criterion_that_another_thread_decides_ends_the_fast_loop(make_model, messages, calls, num_beams):
    model, asked = make_model(), []
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": num_beams}

    def is_over():
        asked.append(True)
        return len(asked) == 3

    found = generate(model, documents(0, 3), how | {"stopping_criteria": [StopWhen(is_over)]})
    assert len(asked) == 3
    if num_beams == 1:
        assert found.tolist() == generate(model, documents(0, 3), how)[:, :4].tolist()
    assert calls == messages == []


def add_hook(model):
    model.model.decoder.layers[1].fc1.register_forward_hook(lambda *values: None)


def replace_forward(model):
    model.lm_head.forward = model.lm_head.forward


def replace_method(model):
    class Other(type(model)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model.__class__ = Other


def add_prompts(model):
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    return peft.get_peft_model(model, config).eval()


def shard(model):
    model.lm_head.weight.ds_numel = 9


@pytest.mark.parametrize(
    "change",
    [
        add_hook,
        replace_forward,
        replace_method,
        add_prompts,
        torch.nn.Module.train,
        lambda model: setattr(model.lm_head.weight, "ds_numel", 9),
    ],
    ids=["hook", "method", "class", "prompts", "training", "sharded"],
)
def test_changed_models_run_hugging_faces_loop_and_say_so(make_model, messages, calls, change):
    model = make_model(tie_word_embeddings=False)
    changed = change(model) or model
    generate(changed, {"input_ids": random_ids(2, 8)}, {"max_new_tokens": 4, "num_beams": 2})
    assert calls == ["_beam_search"]
    assert len(messages) == 1


def test_hooks_of_a_deepspeed_engine_are_no_obstacle(make_model, messages, calls):
    def count(*values):
        pass

    model = make_model()
    model.register_forward_hook(count)
    generate(model, documents(0, 2), {"max_new_tokens": 4})
    assert calls.pop()
    count.__module__ = "deepspeed.runtime.engine"
    generate(model, documents(0, 2), {"max_new_tokens": 4})
    assert not calls


def test_autocast_runs_hugging_faces_loop(make_model, messages, calls):
    with torch.autocast("cpu", torch.bfloat16):
        generate(make_model().float(), documents(0, 2), {"max_new_tokens": 4})
    assert calls
    assert "autocast" in messages[0]


def test_the_loop_is_chosen_by_argument_and_by_configuration(make_model, messages, calls, caplog):
    model, inputs = make_model(), documents(0, 2)
    expected = generate(model, inputs, {"max_new_tokens": 4})
    assert calls == []
    found = [generate(model, inputs, {"max_new_tokens": 4}, fast=False)]
    found.append(generate(model, inputs, {"generation_config": GenerationConfig(max_new_tokens=4, fast=False)}))
    model.generation_config.fast = False
    found.append(generate(model, inputs, {"max_new_tokens": 4}))
    assert len(calls) == 3
    generate(model, inputs, {"max_new_tokens": 4}, fast=True)
    assert len(calls) == 3
    assert all(torch.equal(ids, expected) for ids in found)
    assert not messages
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_adapters_are_covered(make_model, calls, how):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    inputs = documents(0, 2)
    found = generate(model, inputs, how | {"max_new_tokens": 8})
    assert not calls
    assert torch.equal(found, generate(model, inputs, how | {"max_new_tokens": 8}, fast=False))
    with model.disable_adapter():
        plain = generate(model, inputs, how | {"max_new_tokens": 8})
    assert plain.tolist() != found.tolist()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_packed_contexts_are_covered(make_model, calls, how):
    model = make_model(decoder_context="section")
    is_target = torch.zeros(1, 20, dtype=torch.bool)
    # sections of 1, 1, 1, 1 and 16 segments
    is_target[0, [0, 1, 2, 3, 19]] = True
    inputs = {"input_ids": random_ids(1, 20, 8), "target_segments": is_target}
    how = how | {"max_new_tokens": 6}
    found = generate(model, inputs, how, may_pack=True)
    assert not calls
    assert torch.equal(found, generate(model, inputs, how, may_pack=True, fast=False))
    assert len(calls) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_those_of_the_model_in_each_type(make_model, dtype, monkeypatch):
    model = make_model(prefix_attention="gated").to(dtype)
    inputs, seen = documents(0, 2), []
    choose = session.TokenSearch.choose
    monkeypatch.setattr(session.TokenSearch, "choose", lambda self, part: seen.append(part) or choose(self, part))
    ids = generate(model, inputs, {"max_new_tokens": 6, "eos_token_id": None, "forced_eos_token_id": None})
    expected = model(**inputs, decoder_input_ids=ids[:, :-1]).logits.float()
    found = torch.stack(seen, dim=1)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


class Words(BaseStreamer):
    """Streamer that keeps everything it gets."""

    def __init__(self):
        self.found = []

    def put(self, value):
        self.found.append(value.tolist())

    def end(self):
        self.found.append("end")


@pytest.mark.parametrize("how", [{}, {"do_sample": True}], ids=["greedy", "sampling"])
def test_streamers_get_the_same_tokens(make_model, calls, how):
    model, inputs = make_model(), documents(0, 1)
    streams = []
    for fast in (True, False):
        streams.append(Words())
        generate(model, inputs, how | {"max_new_tokens": 6}, streamer=streams[-1], fast=fast)
    assert calls == ["_sample"]
    assert streams[0].found == streams[1].found


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "early_stopping": "never", "length_penalty": 5.0}],
    ids=["greedy", "sampling", "beams", "never"],
)
def test_a_text_that_never_ends_stops_at_its_most_tokens(make_model, how):
    model = make_model()
    how = how | {"suppress_tokens": [2], "forced_eos_token_id": None, "max_new_tokens": 24}
    found = generate(model, documents(0, 2), how)
    assert found.shape == (2, 25)
    assert torch.equal(found, generate(model, documents(0, 2), how, fast=False))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_text_longer_than_the_position_table_is_an_error(make_model, how):
    model = make_model(max_position_embeddings=12)
    how = how | {"suppress_tokens": [2], "forced_eos_token_id": None}
    texts = [generate(model, documents(0, 2), how | {"max_new_tokens": 12}, fast=fast) for fast in (True, False)]
    assert torch.equal(*texts)
    errors = []
    for fast in (True, False):
        with pytest.raises(ValueError, match="max_position_embeddings is 12") as error:
            generate(model, documents(0, 2), how | {"max_new_tokens": 13}, fast=fast)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_text_that_ends_within_the_table_may_have_a_higher_limit(make_model):
    model = make_model(max_position_embeddings=12)
    how = {"max_new_tokens": 40, "forced_eos_token_id": None, "eos_token_id": list(range(40))}
    texts = [generate(model, documents(0, 1), how, fast=fast) for fast in (True, False)]
    assert torch.equal(*texts)


def test_a_full_gpu_names_what_to_lower(make_model, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session.DecodeSession, "load", fail)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as error:
        generate(make_model(), documents(0, 2), {"max_new_tokens": 4, "num_beams": 3})
    assert "2 documents" in str(error.value)
    assert all(name in str(error.value) for name in ("batch size", "num_beams", "max_new_tokens"))


def test_hooks_of_all_modules_run_hugging_faces_loop(make_model, messages, calls):
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *values: None)
    try:
        generate(make_model(), documents(0, 2), {"max_new_tokens": 4})
    finally:
        hook.remove()
    assert calls == ["_sample"]


def test_a_length_beyond_the_table_may_set_the_penalty(make_model, calls):
    """The longest text of the settings is longer than the table of positions, and ends before its end."""
    model = make_model(max_position_embeddings=12).float()
    how = {"max_new_tokens": 40, "num_beams": 2, "early_stopping": "never", "length_penalty": 0.1}
    how |= {"eos_token_id": list(range(4, 60)), "forced_eos_token_id": None}
    found = generate(model, documents(0, 2), how)
    assert not calls
    assert torch.equal(found, generate(model, documents(0, 2), how, fast=False))


def test_a_loop_of_the_user_gets_hugging_faces_cache(make_model):
    seen = []

    def loop(model, input_ids, **kwargs):
        seen.append(set(kwargs))
        return input_ids

    make_model().generate(**documents(0, 2), custom_generate=loop, max_new_tokens=3)
    assert "past_key_values" in seen[0]
    assert "make_cache" not in seen[0]
