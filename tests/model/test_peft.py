"""Tests that PEFT wraps, trains and unwraps the model."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

from recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.model import peft_adapters
from tiny import NORM_ORDERS, RECURRENT, random_ids, tiny_model


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_lora_trains_merges_and_loads_as_a_plain_model(tmp_path, norms):
    inputs = {"input_ids": random_ids(2, 3, 8), "labels": random_ids(2, 5)}
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["recurrence"], init_lora_weights=False
    )
    model = get_peft_model(tiny_model(**norms), config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("modules_to_save.default.projection_in" in name for name in moved)
    model.eval()
    adapted, texts = model(**inputs).logits, model.generate(inputs["input_ids"], max_new_tokens=6)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    loaded = RecurrentBartForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, adapted, rtol=0, atol=1e-5)
    assert torch.equal(loaded.generate(inputs["input_ids"], max_new_tokens=6), texts)


def test_adapters_for_summarisation_are_saved_alone_and_put_on_the_model_again(tmp_path):
    """Use PEFT's encoder-decoder class, which has separate `forward` and `generate`."""
    base, inputs = tiny_model().eval(), {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["recurrence"],
        init_lora_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    logits = model(**inputs).logits
    assert torch.equal(again(**inputs).logits, logits)
    assert not torch.allclose(base(**inputs).logits, logits)
    plain, ids = again.merge_and_unload(), random_ids(2, 3, 8)
    for how in ({"num_beams": 3}, {"decode_at": "every_segment"}):
        found, expected = (one.generate(input_ids=ids, max_new_tokens=5, **how) for one in (model, plain))
        assert torch.equal(found, expected)


def test_adapters_train_under_checkpointing_as_without():
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["recurrence"])
    model = get_peft_model(tiny_model(), config).train()
    gradients = []
    for grain in ("none", "layer", "segment"):
        model.get_base_model().set_gradient_checkpointing(grain)
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for found in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(found[name], expected, msg=name)
    # A gets no gradient while B is zero
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "lora_B" in name)


@pytest.fixture
def convert(bart, tmp_path):
    """Convert a checkpoint of plain BART; each call draws a new recurrence."""
    bart.save_pretrained(tmp_path / "bart")

    def convert(**fields):
        fields = RECURRENT | {"hidden_dropout_prob": 0.0} | fields
        return RecurrentBartForConditionalGeneration.from_pretrained(tmp_path / "bart", **fields)

    return convert


def trained(model, inputs):
    """Return the model after two large steps, in evaluation mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2),
        pytest.param(LoraConfig(r=2, task_type="SEQ_2_SEQ_LM"), marks=pytest.mark.slow),
        LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["layernorm_embedding"]),
        IA3Config(task_type="SEQ_2_SEQ_LM"),
    ],
    ids=["lora", "lora for seq2seq", "lora with other modules to save", "ia3"],
)
def test_adapters_are_saved_with_the_recurrence(convert, tmp_path, config):
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    model = trained(get_peft_model(convert(), copy.deepcopy(config)), inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(convert(), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(convert().eval()(**inputs).logits, model(**inputs).logits)


def test_adapters_that_transformers_adds_are_saved_with_the_recurrence(convert, tmp_path):
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    model = convert()
    model.add_adapter(LoraConfig(r=2))
    trained(model, inputs).save_pretrained(tmp_path / "adapter")
    again = convert()
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_adapters_that_transformers_deletes_leave_the_model_as_it_was(convert):
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    model = convert().eval()
    before = model(**inputs).logits
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False), adapter_name=name)
        assert not torch.equal(model.eval()(**inputs).logits, before)
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    model.delete_adapter("second")
    assert not hasattr(model, "peft_config")
    assert torch.equal(model.eval()(**inputs).logits, before)


def test_default_target_modules_are_those_of_bart(bart, convert):
    ours, theirs = (get_peft_model(model, LoraConfig(r=2)).targeted_module_names for model in (convert(), bart))
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize(
    ("fields", "config", "said"),
    [
        ({}, {"modules_to_save": []}, "is not saved with the adapter"),
        ({"prefix_attention": "gated"}, {}, "memory_gate of the decoder is not trained"),
        ({}, {}, None),
        ({"pre_seq_len": 0}, {"modules_to_save": []}, None),
    ],
    ids=["left out", "gated", "saved", "no recurrence"],
)
def test_what_adapters_leave_untrained_is_said(convert, monkeypatch, fields, config, said):
    warnings = []
    monkeypatch.setattr(peft_adapters.logger, "warning", warnings.append)
    get_peft_model(convert(**fields), LoraConfig(r=2, **config))
    assert [said in text for text in warnings] == ([] if said is None else [True])


def test_checkpointing_of_a_quantised_model_is_not_reentrant():
    inputs = {"input_ids": random_ids(2, 20), "labels": random_ids(2, 5)}
    model = tiny_model().train()
    expected = model(**inputs).loss
    prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=2))
    loss = model(**inputs).loss
    # reentrant checkpointing would run backward through the graph twice
    loss.backward()
    assert torch.equal(loss, expected)
