"""Gradients of several passes: summed in float32 and reduced once, under every ZeRO stage."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from forked import launched, run_script
from process_state import ProcessState
from recurrent_bart.training.environment import start_processes
from recurrent_bart.training.zero.engine import build_engine, full_state_dict, reducing_once
from tiny import BUCKET, random_ids, tiny_model

WORKER = Path(__file__).with_name("gradient_sums_worker.py")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SHARDINGS = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-overlap": {"stage": 2, "overlap_comm": True, "contiguous_gradients": False},
    "zero2-offload": {"stage": 2, **OFFLOAD},
    "zero3": {"stage": 3},
    "zero3-persistent": {"stage": 3, "stage3_param_persistence_threshold": 100_000, "contiguous_gradients": True},
    "zero3-offload": {"stage": 3, "contiguous_gradients": True, **OFFLOAD},
}


def configuration(zero, types=None, bf16=True):
    if zero["stage"] == 3:
        zero = {"stage3_param_persistence_threshold": 0} | zero
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "data_types": types or {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": BUCKET | zero,
    }


def build(zero, types=None, rate=0.0, trained=lambda name: True, bf16=True, **changes):
    """Build an engine around a tiny model, with SGD."""
    torch.manual_seed(0)
    model = tiny_model(init_std=0.1, **changes).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build_engine(model, torch.optim.SGD(parameters, lr=rate), None, configuration(zero, types, bf16))


def batches(number):
    torch.manual_seed(1)
    return [{"input_ids": random_ids(1, 2, 4), "labels": random_ids(1, 2)} for _ in range(number)]


def run_passes(engine, documents):
    for batch in documents:
        engine.backward(engine(**batch, return_logits=False).loss)


def step_gradients(engine, documents, once=True, call=None):
    """Return the unsharded float32 gradients of a step; `call` may replace the model's loss."""
    with reducing_once(engine) if once else contextlib.nullcontext():
        if call is None:
            run_passes(engine, documents)
        else:
            for inputs in documents:
                engine.backward(call(inputs))
    found = {
        name: safe_get_full_grad(parameter).float().clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    engine.step()
    return found


def relative_error(found, expected):
    difference = math.sqrt(sum(float((found[name] - expected[name]).double().square().sum()) for name in expected))
    return difference / math.sqrt(sum(float(total.double().square().sum()) for total in expected.values()))


def float64_sum(each, counts):
    return {name: sum(n * one[name].double() for one, n in zip(each, counts, strict=True)) for name in each[0]}


# shardings that `make test` covers by a similar one
SLOW = ("zero2-overlap", "zero3-persistent")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(zero, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, zero in SHARDINGS.items()
    ],
)
def engine(request):
    """Return an engine of each sharding, which several tests use: building it takes longer than some passes."""
    state = ProcessState()
    start_processes(timeout_minutes=2)
    found = build(request.param)
    state.restore()
    return found


@contextlib.contextmanager
def learning(engine, rate=0.5):
    """Set the learning rate, which is 0 before and after."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    yield
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0


@pytest.mark.slow
def test_sums_of_many_passes_are_those_of_float32(alone, engine):
    """Read four documents repeatedly; each document alone gives a term of the expected sum."""
    documents = batches(4)
    each = [step_gradients(engine, [document], once=False) for document in documents]
    found = step_gradients(engine, documents * 2)
    assert relative_error(found, float64_sum(each, [2] * 4)) < 1e-5


def test_between_passes_no_gradient_but_the_sums_is_kept(alone, engine):
    with reducing_once(engine):
        for batch in batches(2):
            run_passes(engine, [batch])
            assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert all(getattr(parameter, "grad_accum", None) is None for parameter in engine.module.parameters())
    engine.step()


def test_a_pass_that_fails_leaves_nothing_behind(alone, engine):
    check_after_a_failed_pass(engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_pass_that_fails_leaves_nothing_behind_in_float32(alone, stage):
    """Check float32 weights, for which autograd itself sums the gradients of the passes."""
    check_after_a_failed_pass(build({"stage": stage}, bf16=False))


def check_after_a_failed_pass(engine):
    documents = batches(4)
    expected = step_gradients(engine, documents[2:])

    def fail():
        with reducing_once(engine):
            run_passes(engine, documents[:2])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    found = step_gradients(engine, documents[2:])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_pass_that_is_not_finite_spoils_the_step_alone(alone, engine):
    documents = batches(4)
    expected = step_gradients(engine, documents[2:])
    before = full_state_dict(engine)
    for n_passes in (1, 2):
        with learning(engine):
            with reducing_once(engine) if n_passes > 1 else contextlib.nullcontext():
                run_passes(engine, documents[: n_passes - 1])
                engine.backward(engine(**documents[1]).loss * math.nan)
            engine.step()
        assert not engine.was_step_applied()
        after = full_state_dict(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)
        found = step_gradients(engine, documents[2:])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# last of the engine's tests, because it changes the weights
@pytest.mark.slow
def test_a_step_of_several_passes_moves_the_weights_by_their_sum(alone, engine):
    """Check the update as well as the gradient; a second step must start without sums."""
    documents = batches(6)
    expected = full_state_dict(engine)
    with learning(engine):
        for step in (documents[:4], documents[4:]):
            gradients = step_gradients(engine, step)
            for name, gradient in gradients.items():
                expected[name] = expected[name] - 0.5 * gradient
    found = full_state_dict(engine)
    for name in gradients:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_512_passes_are_summed_to_more_than_a_thousandth(alone, stage, monkeypatch):
    """Use two layers, because passes of the whole model take too long. In bfloat16 the error would be 30 %."""
    # these two layers have no encoder and decoder to make leaves of
    monkeypatch.setattr("recurrent_bart.training.zero.engine.set_z3_leaf_modules", lambda model, kinds: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 1)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = build_engine(model, optimizer, None, configuration({"stage": stage}))
    inputs = torch.randn(4, 2, 24).bfloat16()
    each = [step_gradients(engine, [part], once=False, call=lambda part: engine(part).sum()) for part in inputs]
    found = step_gradients(engine, list(inputs) * 128, call=lambda part: engine(part).sum())
    assert relative_error(found, float64_sum(each, [128] * 4)) < 1e-3


@pytest.mark.slow
def test_sums_in_bfloat16_are_had_for_the_asking(alone):
    """Set `grad_accum_dtype` to bfloat16; its error is far above the bound of the test above."""
    documents = batches(4)
    engine = build({"stage": 2}, {"grad_accum_dtype": "bf16"})
    each = [step_gradients(engine, [document], once=False) for document in documents]
    assert relative_error(step_gradients(engine, documents * 8), float64_sum(each, [8] * 4)) > 3e-3


# every pair of stage, tied and frozen
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "is_tied", "is_frozen"), [(2, True, True), (2, False, False), (3, True, False), (3, False, True)]
)
def test_tied_and_frozen_parameters_are_summed_too(alone, stage, is_tied, is_frozen):
    def trained(name):
        return not is_frozen or "recurrence." in name or "shared" in name

    documents = batches(4)
    engine = build({"stage": stage}, trained=trained, tie_word_embeddings=is_tied)
    each = [step_gradients(engine, [document], once=False) for document in documents]
    assert relative_error(step_gradients(engine, documents), float64_sum(each, [1] * 4)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_float32_sums_are_autograds_own(alone, stage):
    """Compare bitwise with DeepSpeed's own accumulation."""
    documents = batches(5)
    found = step_gradients(build({"stage": stage}, bf16=False), documents)
    engine = build({"stage": stage}, bf16=False)
    with engine.coalesce_grad_reduction():
        run_passes(engine, documents)
    expected = step_gradients(engine, [], once=False)
    assert any(total.any() for total in expected.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.distributed
def test_ranks_exchange_their_sums_in_float32(tmp_path):
    """Bound the error of the exchange, which in bfloat16 would be 1e-3."""
    output = tmp_path / "errors.json"
    ended = run_script(WORKER, output, environments=launched(2))
    assert set(ended.codes) == {0}, ended.text()
    errors = json.loads(output.read_text())
    assert errors.keys() == {"1", "2", "3"}
    assert max(errors.values()) < 1e-6, errors
