"""Trained and frozen parameters; a model with merged adapters is a plain model."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from forked import launched, run_script
from recurrent_bart.data.tokenizer import load_tokenizer
from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.adapters import choose_trained, merged
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.optimization import is_adapter
from runs import cut_off, flags
from saved_tensors import differing, saved_tensors
from tiny import random_ids, tiny_model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_recurrence_alone_is_trained():
    model = tiny_model(prefix_attention="gated")
    choose_trained(model, ModelArguments(train="prefix"))
    assert trained(model) == {name for name, _ in model.named_parameters() if is_recurrence(name)}
    assert any("memory_gate" in name for name in trained(model))


def test_all_is_trained_unless_told():
    model = tiny_model()
    choose_trained(model, ModelArguments())
    assert trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"prefix_projection": False}, {"recurrence": "top"}], ids=str)
def test_merged_weights_give_the_logits_of_the_adapters(fields):
    arguments, model = ModelArguments(lora_r=2, lora_alpha=3), tiny_model(**fields).double()
    choose_trained(model, arguments)
    model.double().eval()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            # B is initially zero, so merging would have no effect
            torch.nn.init.normal_(parameter)
    plain = tiny_model(**fields).double().eval()
    inputs = {"input_ids": random_ids(2, 3, 8), "labels": random_ids(2, 5)}
    report = plain.load_state_dict(merged(model.state_dict(), arguments))
    assert not report.missing_keys
    assert not report.unexpected_keys
    adapted, without = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(without, adapted, rtol=0, atol=1e-10)


def test_adapters_are_trained_beside_the_recurrence():
    model = tiny_model()
    choose_trained(model, ModelArguments(lora_r=2))
    assert trained(model) == {name for name, _ in model.named_parameters() if is_adapter(name) or is_recurrence(name)}
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained(model) if is_adapter(name)}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "half"}, "--train half: allowed are all, prefix"),
        ({"lora_r": -1}, "--lora_r -1: must be at least 0"),
        ({"lora_r": 2, "train": "prefix"}, "--lora_r 2: must be 0 with --train prefix"),
        ({"train": "prefix", "pre_seq_len": 0}, "--train prefix: needs --pre_seq_len of at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**fields)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        choose_trained(tiny_model(), ModelArguments(lora_r=2))


def changed(run, before):
    """Return the names of weights in `RUN/model` that differ from the initial model of a run."""
    after = load_file(run / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


@pytest.mark.distributed
@pytest.mark.slow
def test_runs_change_what_they_train_and_leave_a_plain_model(train_main, documents, tmp_path):
    first = tmp_path / "first"
    still = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0, "recurrence_learning_rate": 0}
    assert train_main(flags(documents, first, **still)) == 0
    before = load_file(first / "model" / "model.safetensors")
    choices = {"prefix": {"train": "prefix"}, "lora": {"lora_r": 2}}
    for name, choice in choices.items():
        for stage in (2, 3):
            run = tmp_path / f"{name}{stage}"
            rates = {"learning_rate": 0.01, "recurrence_learning_rate": 0.01}
            arguments = flags(documents, run, deepspeed=f"ds_configs/zero{stage}.json", eval_every=6, **choice, **rates)
            assert train_main(arguments) == 0
            expected = {weight for weight in before if is_recurrence(weight)}
            if name == "lora":
                expected |= {weight for weight in before if weight.endswith(("q_proj.weight", "v_proj.weight"))}
            found = changed(run, before)
            assert found <= expected
            # in a few steps, single weights may stay equal, but not all weights of one kind
            assert {weight.rsplit(".", 2)[-2] for weight in expected} == {weight.rsplit(".", 2)[-2] for weight in found}
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "lora3" / "model")
    tokenizer = load_tokenizer(str(tmp_path / "lora3" / "model"))
    assert model.generate(**tokenizer("ant bee cow", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_a_resumed_run_with_adapters_is_the_one_never_cut_off(train_main, documents, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_main(flags(documents, whole, lora_r=2, max_steps=4)) == 0
    cut_off(whole, cut)
    assert train_main(["--resume", str(cut)]) == 0
    found, expected = (saved_tensors(run / "checkpoints" / "step-00000004") for run in (cut, whole))
    assert not differing(found, expected)
    assert any("exp_avg" in name for name in expected)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_adapters_under_zero3(documents, tmp_path):
    changes = {"deepspeed": "ds_configs/zero3.json", "lora_r": 2, "task": "sections", "max_steps": 2}
    arguments = flags(documents, tmp_path / "run", **changes)
    ended = run_script("launch/train.py", *arguments, environments=launched(2))
    assert ended.codes == [0, 0], ended.text()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
