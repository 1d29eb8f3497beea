"""The bfloat16 copy follows the float32 master weights, however small the steps."""

import contextlib
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from recurrent_bart.studies.documents.engine import SingleProcessEngine
from recurrent_bart.training.optimization import LearningRates, build_optimizer
from recurrent_bart.training.zero.deepspeed_config import load_deepspeed_config
from recurrent_bart.training.zero.engine import build_engine, reducing_once
from tiny import BUCKET, random_ids, tiny_model

CONFIGS = Path(__file__).parents[3] / "ds_configs"


def make_engine(model, is_bf16, rate=0.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return SingleProcessEngine(model, scheduler, max_grad_norm=0.0, is_bf16=is_bf16)


def test_in_float32_there_is_one_model():
    model = nn.Linear(1, 1, bias=False)
    engine = make_engine(model, is_bf16=False, rate=1.0)
    assert engine.module is engine.master is model
    expected = model.weight.detach() - 2.0
    engine.backward(2.0 * model.weight.sum())
    engine.step()
    assert (model.weight.equal(expected), model.weight.grad) == (True, None)


def test_weights_are_rounded_before_the_first_step_and_tied_ones_stay_tied():
    engine = make_engine(tiny_model().float(), is_bf16=True)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in engine.master.parameters()} == {torch.float32}
    for own, precise in zip(engine.module.parameters(), engine.master.parameters(), strict=True):
        assert own.float().equal(precise)
    assert engine.module.lm_head.weight is engine.module.model.shared.weight


def test_gradients_of_several_passes_are_added_in_float32():
    engine = make_engine(nn.Linear(1, 1, bias=False), is_bf16=True)
    # in bfloat16, 256 + 1 is 256
    for value in (256.0, 1.0):
        engine.backward(value * engine.module.weight.sum())
        assert engine.module.weight.grad is None
    assert engine.master.weight.grad.item() == 257.0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("n_passes", [1, 6])
def test_gradients_are_those_of_the_trainers_own_loop(alone, stage, n_passes):
    """Compare to the last bit, over several passes too."""
    config = load_deepspeed_config(CONFIGS / f"zero{stage}.json", 1, max_grad_norm=0.0, use_bf16=True)
    config["zero_optimization"] |= BUCKET
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny_model(init_std=0.1).float().train())
    single = make_engine(models[0], is_bf16=True)
    engine = build_engine(models[1], build_optimizer(models[1], LearningRates(0.0, 0.0), 0.0), None, config)
    batches = [(random_ids(2, 3, 8), random_ids(2, 5)) for _ in range(n_passes)]
    for ids, labels in batches:
        single.backward(single.module(ids, labels=labels, num_items_in_batch=60, return_logits=False).loss)
    with reducing_once(engine) if n_passes > 1 else contextlib.nullcontext():
        for ids, labels in batches:
            engine.backward(engine(ids, labels=labels, num_items_in_batch=60, return_logits=False).loss)
    expected = {name: parameter.grad for name, parameter in single.master.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_grad(parameter).float(), expected[name]), name
    engine.step()


def test_steps_too_small_for_bfloat16_add_up():
    engine = make_engine(nn.Linear(1, 1, bias=False), is_bf16=True, rate=2**-10)
    with torch.no_grad():
        engine.master.weight.fill_(1.0)
    for _ in range(8):
        engine.backward(-engine.module.weight.sum())
        engine.step()
    assert engine.module.weight.item() == 1.0 + 2**-7
