"""Gradient norms of parts: equal to PyTorch's, under every ZeRO stage."""

import copy
import math

import pytest
import torch

from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.zero.engine import build_engine
from recurrent_bart.training.zero.gradient_norms import GradientNorms
from tiny import BUCKET, random_ids, tiny_model

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def sharded(model, zero):
    if zero["stage"] == 3:
        zero = zero | {"stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": BUCKET | zero,
    }
    return build_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), None, config)


def expected_norms(model, batches):
    model.zero_grad()
    for ids, labels in batches:
        model(ids, labels=labels).loss.backward()
    squares = {False: 0.0, True: 0.0}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[is_recurrence(name)] += float(parameter.grad.double().square().sum())
    return squares[False] ** 0.5, squares[True] ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero",
    [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 2, **OFFLOAD}, {"stage": 3, **OFFLOAD}],
    ids=lambda zero: "-".join(map(str, zero.values())),
)
def test_each_part_has_the_norm_of_its_gradient(alone, zero):
    model = tiny_model(init_std=0.15).train()
    plain = copy.deepcopy(model)
    engine = sharded(model, zero)
    norms = GradientNorms(engine)
    for number in range(2):
        batches = [(random_ids(2, 3, 8), random_ids(2, 6)) for _ in range(2)]
        with engine.coalesce_grad_reduction():
            for ids, labels in batches:
                engine.backward(engine(ids, labels=labels).loss)
        backbone, recurrence = (math.sqrt(square) for square in norms.squares())
        engine.step()
        # before clipping, like DeepSpeed's norm
        assert math.hypot(backbone, recurrence) == pytest.approx(float(engine.get_global_grad_norm()), rel=1e-5)
        if number == 0:
            assert (backbone, recurrence) == pytest.approx(expected_norms(plain, batches), rel=1e-4)
            assert recurrence > 0


def test_what_is_frozen_has_none(alone):
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_recurrence(name)
    engine = sharded(model, {"stage": 2})
    engine.backward(engine(random_ids(2, 3, 8), labels=random_ids(2, 6)).loss)
    backbone, recurrence = GradientNorms(engine).squares()
    assert backbone == 0.0
    assert recurrence > 0
