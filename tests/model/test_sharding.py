"""Tests with sharded or offloaded parameters that hooks load for module calls: FSDP, offloading, device maps."""

import accelerate
import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from processes import run_in_processes
from recurrent_bart import RecurrentBartForConditionalGeneration
from tiny import NORM_ORDERS, random_ids, tiny_model

FIELDS = {
    "projection": {},
    "own projection": {"prefix_projection": False},
    "top": {"recurrence": "top", "prefix_projection": False},
    "static": {"recurrence": "none", "prefix_projection": False},
    "memory": {"associative_memory": True, "matrix_gate_init": 1.0, "decoder_context": "memory"},
    "gated": {"prefix_attention": "gated", "decoder_context": "all"},
    "no recurrence": {"pre_seq_len": 0},
    "pre-norm": {"normalize_before": True},
    "pre-norm top": {"normalize_before": True, "recurrence": "top", "prefix_projection": False},
}


def documents():
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    return {"input_ids": random_ids(2, 20), "attention_mask": mask, "labels": random_ids(2, 5)}


@pytest.mark.each_value
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_an_offloaded_model_gives_the_same(fields):
    model, inputs = tiny_model(**fields).eval(), documents()
    with torch.no_grad():
        expected = model(**inputs)
        texts = model.generate(inputs["input_ids"], max_new_tokens=4)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in model.parameters())
        found = model(**inputs)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4), texts)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


def test_an_offloaded_model_runs_layer_by_layer_whatever_its_schedule():
    model, inputs = tiny_model(schedule="wavefront").eval(), documents()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = accelerate.cpu_offload(model, execution_device="cpu")(**inputs).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_model_loaded_by_a_device_map_gives_the_same(tmp_path, fields, place):
    model, inputs = tiny_model(**fields).eval(), documents()
    model.save_pretrained(tmp_path / "model")
    # do not move the tied embedding: transformers cannot offload it to disk, in plain BART neither
    here = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head", "final_logits_bias")
    parts = ["layers", "embed_positions", "layernorm_embedding", *["layer_norm"] * model.config.normalize_before]
    away = [f"model.{side}.{part}" for side in ("encoder", "decoder") for part in parts] + ["model.encoder.recurrence"]
    device_map = dict.fromkeys(here, "cpu") | dict.fromkeys(away, place)
    again = RecurrentBartForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in again.parameters()) == (place == "disk")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("norms", NORM_ORDERS.values(), ids=NORM_ORDERS)
def test_the_units_for_wrappers_are_modules_of_the_model(norms):
    model = tiny_model(**norms)
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= kinds
    layers = {type(layer).__name__ for stack in (model.model.encoder, model.model.decoder) for layer in stack.layers}
    assert set(model._no_split_modules) == layers


def test_each_layer_is_called_as_a_module_once_per_segment():
    model, inputs = tiny_model().eval(), documents()
    calls = []
    for number, layer in enumerate(model.model.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(**inputs)
    # three segments of at most eight tokens
    assert calls == [0, 1, 2] * 3


def fsdp1(model):
    layers = ModuleWrapPolicy({BartEncoderLayer, BartDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=layers, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model):
    for layer in model.modules():
        if isinstance(layer, BartEncoderLayer | BartDecoderLayer):
            fully_shard(layer)
    return fully_shard(model)


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("shard", [fsdp1, fsdp2], ids=["FSDP1", "FSDP2"])
@pytest.mark.distributed
def test_a_step_with_sharded_layers_is_that_of_one_process(tmp_path, shard, checkpointing):
    def work(rank):
        found = {}
        for name, fields in FIELDS.items():
            torch.manual_seed(0)
            plain, sharded, inputs = tiny_model(**fields), tiny_model(**fields), documents()
            sharded.load_state_dict(plain.state_dict())
            sharded.set_gradient_checkpointing(checkpointing)
            sharded = shard(sharded)
            for model in (plain, sharded):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                # both processes have the same documents, so the mean equals one process
                model(**inputs).loss.backward()
                optimizer.step()
            if shard is fsdp1:
                with FullyShardedDataParallel.summon_full_params(sharded):
                    weights = {name: part.clone() for name, part in sharded.named_parameters()}
            else:
                weights = {name: whole(part) for name, part in sharded.named_parameters()}
            differences = [
                (weights[key.replace("_fsdp_wrapped_module.", "")] - expected).abs().max().item()
                for key, expected in plain.named_parameters()
            ]
            found[name] = max(differences)
        return found

    for found in run_in_processes(work, 2, tmp_path):
        assert all(difference < 1e-5 for difference in found.values()), found
