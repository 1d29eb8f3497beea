"""PEFT wraps the model, trains it, and leaves it as it would be without."""

import torch
from peft import LoraConfig, get_peft_model

from recurrent_bart import RecurrentBartForConditionalGeneration
from tiny import random_ids, tiny_model


def test_lora_trains_merges_and_loads_as_a_plain_model(tmp_path):
    inputs = {"input_ids": random_ids(2, 3, 8), "labels": random_ids(2, 5)}
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["recurrence"], init_lora_weights=False
    )
    model = get_peft_model(tiny_model(), config)
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
