"""What computes in bfloat16 follows what is trained in float32, however small the steps."""

import torch
from torch import nn

from recurrent_bart.studies.master_weights import MasterWeights
from tiny import tiny_model


def test_in_float32_there_is_one_model():
    model = tiny_model().float()
    weights = MasterWeights(model, is_bf16=False)
    assert weights.model is weights.master is model
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    weights.collect_gradients()
    assert model.lm_head.weight.grad.equal(torch.ones_like(model.lm_head.weight))
    weights.round()


def test_weights_are_rounded_before_the_first_step_and_tied_ones_stay_tied():
    weights = MasterWeights(tiny_model().float(), is_bf16=True)
    assert {p.dtype for p in weights.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in weights.master.parameters()} == {torch.float32}
    for own, precise in zip(weights.model.parameters(), weights.master.parameters(), strict=True):
        assert own.float().equal(precise)
    assert weights.model.lm_head.weight is weights.model.model.shared.weight


def test_gradients_of_several_passes_are_added_in_float32():
    weights = MasterWeights(nn.Linear(1, 1, bias=False), is_bf16=True)
    # of bfloat16 256 + 1 would be 256
    for value in (256.0, 1.0):
        (value * weights.model.weight.sum()).backward()
        weights.collect_gradients()
        assert weights.model.weight.grad is None
    assert weights.master.weight.grad.item() == 257.0


def test_steps_too_small_for_bfloat16_add_up():
    weights = MasterWeights(nn.Linear(1, 1, bias=False), is_bf16=True)
    with torch.no_grad():
        weights.master.weight.fill_(1.0)
    for _ in range(8):
        with torch.no_grad():
            weights.master.weight += 2**-10
        weights.round()
    assert weights.model.weight.item() == 1.0 + 2**-7
