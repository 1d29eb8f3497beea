"""Engine: export of the gathered model, frozen parameters, bf16."""

import math

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import nvtx, z3_leaf_module

from played_graphs import play_graphs
from recurrent_bart.execution import cuda_graphs as recorded_call
from recurrent_bart.execution.stacked_layers import why_not_stacked
from recurrent_bart.execution.wavefront import Wavefront
from recurrent_bart.model import modeling_decoder
from recurrent_bart.training.zero.engine import build_engine, full_state_dict, gathered_for_evaluation
from tiny import BUCKET, random_ids, tiny_model

STAGES = pytest.mark.parametrize("stage", [2, 3])


def build(model, stage, bf16=False):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            **BUCKET,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        },
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build_engine(model.train(), torch.optim.SGD(trained, lr=0.1), None, config)


def inputs():
    return {"input_ids": random_ids(2, 3, 8), "labels": random_ids(2, 4)}


@pytest.mark.slow
@STAGES
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_the_whole_state_is_the_models_own(alone, stage, is_frozen, is_tied):
    model = tiny_model(tie_word_embeddings=is_tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen or "recurrence." in name)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = full_state_dict(build(model, stage))
    # tied weights under all of their names
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@STAGES
def test_encoder_layers_of_an_engine_are_computed_together(alone, monkeypatch, stage):
    """Check that attributes that DeepSpeed adds to modules do not make layers look different."""
    model = tiny_model(schedule="wavefront")
    run, n_runs = Wavefront.run, []
    monkeypatch.setattr(Wavefront, "run", lambda *parts: n_runs.append(1) or run(*parts))
    engine = build(model, stage)
    assert why_not_stacked(model.model.encoder.layers) == ""
    engine.backward(engine(**inputs()).loss)
    assert n_runs == [1]


@pytest.mark.slow
@STAGES
def test_frozen_parameters_stay_and_the_others_learn_as_in_plain_pytorch(alone, stage):
    # also in the decoder's first layer, whose input needs no gradient
    trained = ("recurrence.", "memory_gate")

    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        return model

    torch.manual_seed(1)
    plain = freeze(tiny_model(init_std=0.15, prefix_attention="gated")).train()
    torch.manual_seed(1)
    engine = build(freeze(tiny_model(init_std=0.15, prefix_attention="gated")), stage)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for _ in range(2):
        batch = inputs()
        engine.backward(engine(**batch).loss)
        engine.step()
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, expected = full_state_dict(engine), plain.state_dict()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    moved = {name for name in expected if not torch.equal(found[name], before[name])}
    assert all(any(part in name for name in moved) for part in trained)
    assert all(any(part in name for part in trained) for name in moved)


@pytest.mark.slow
def test_encoder_and_decoder_are_gathered_whole(alone):
    model = build(tiny_model(), 3).module.model
    assert all(z3_leaf_module(module) for module in (model.encoder, model.decoder))


@pytest.mark.slow
@STAGES
def test_a_decoder_is_replayed_with_the_weights_of_each_step(alone, monkeypatch, stage):
    monkeypatch.setattr(recorded_call, "can_capture", lambda module, inputs: torch.is_grad_enabled())
    monkeypatch.setattr(modeling_decoder, "can_capture", recorded_call.can_capture)
    batches, found = [inputs() for _ in range(3)], []
    for schedule in ("sequential", "auto"):
        recordings = play_graphs(monkeypatch, recorded_call)
        torch.manual_seed(1)
        engine = build(tiny_model(init_std=0.15, schedule=schedule), stage)
        for batch in batches:
            engine.backward(engine(**batch).loss)
            engine.step()
        found.append(full_state_dict(engine))
        # one capture of the forward pass and one of the backward pass, for all steps
        assert len(recordings) == (2 if schedule == "auto" else 0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@STAGES
def test_bf16_computes_its_loss_in_float32_and_keeps_master_weights(alone, stage):
    engine = build(tiny_model(init_std=0.05), stage, bf16=True)
    batch = inputs()
    before = full_state_dict(engine)
    output = engine(**batch)
    assert output.encoder_last_hidden_state.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), batch["labels"].flatten())
    # this tolerance is below the precision of bf16
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    first = float(output.loss)
    engine.backward(output.loss)
    engine.step()
    for _ in range(9):
        engine.backward(engine(**batch).loss)
        engine.step()
    assert float(engine(**batch).loss) < 0.9 * first
    after = full_state_dict(engine)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    # some values are not representable in bf16, so they come from the float32 weights and not from the model's
    weight = after["model.shared.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(weight, before["model.shared.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_gradients_are_looked_at_together(alone, kind, monkeypatch):
    """Give DeepSpeed one norm of all gradients, and find a gradient that is not finite in one check."""
    lengths, norm_of_each = [], kind.get_grad_norm_direct

    def counted(self, gradients, parameters, norm_type=2):
        lengths.append(len(gradients))
        return norm_of_each(self, gradients, parameters, norm_type)

    monkeypatch.setattr(kind, "get_grad_norm_direct", counted)
    monkeypatch.setattr(kind, "_has_inf_or_nan", None)
    engine = build(tiny_model(), 3 if kind is DeepSpeedZeroOptimizer_Stage3 else 2, bf16=True)
    before = full_state_dict(engine)
    for is_poisoned in (True, False):
        engine.backward(engine(**inputs()).loss)
        if is_poisoned:
            engine.optimizer.averaged_gradients[0][3].view(-1)[0] = math.inf
        engine.step()
        assert engine.was_step_applied() is not is_poisoned
        after = full_state_dict(engine)
        assert is_poisoned == all(torch.equal(after[name], before[name]) for name in before)
    assert set(lengths) == {1}


@STAGES
def test_a_step_marks_nothing_for_profilers(alone, monkeypatch, stage):
    """Emit no profiler range: one per parameter takes as much CPU time as the work it marks."""
    monkeypatch.setattr(nvtx, "_range_push", None)
    engine = build(tiny_model(), stage)
    engine.backward(engine(**inputs()).loss)
    engine.step()


@pytest.mark.slow
@STAGES
def test_a_gradient_taken_in_an_evaluation_is_none_of_trainings(alone, stage):
    batch = inputs()
    weights = []
    for looks in (False, True):
        torch.manual_seed(0)
        engine = build(tiny_model(), stage)
        for _ in range(2):
            if looks:
                with gathered_for_evaluation(engine) as model:
                    embeddings = model.model.encoder.embed_tokens(batch["input_ids"]).detach().requires_grad_()
                    loss = model(inputs_embeds=embeddings, labels=batch["labels"]).loss
                    assert torch.autograd.grad(loss, embeddings)[0].any()
            engine.backward(engine(**batch).loss)
            engine.step()
        weights.append(full_state_dict(engine))
    assert all(torch.equal(weights[1][name], weights[0][name]) for name in weights[0])
