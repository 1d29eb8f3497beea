"""Tests that Recurrent BART without an active recurrence gives BART's results."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration
from transformers.cache_utils import DynamicCache

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from tiny import PLAIN, PLAIN_CLASSES, RECURRENT, TINY, plain_model, random_ids

PADDING = {"none": (12, 12), "right": (12, 7), "single token": (1, 12)}


@pytest.fixture(params=PLAIN_CLASSES)
def family(request):
    return request.param


@pytest.fixture
def bart(family):
    """Return a tiny plain BART or MBart in evaluation mode."""
    return plain_model(family)


@pytest.fixture
def bart_folder(bart, tmp_path):
    bart.save_pretrained(tmp_path / "bart")
    return tmp_path / "bart"


def load(folder, **fields):
    return RecurrentBartForConditionalGeneration.from_pretrained(folder, segment_size=16, **fields)


def load_with_report(folder):
    return RecurrentBartForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **RECURRENT)


def document(lengths):
    """Return ids `(B, n)` with their mask."""
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": random_ids(*mask.shape), "attention_mask": mask}


def labels():
    ids = random_ids(2, 6)
    ids[1, 4:] = -100
    return ids


def assert_same_numbers(ours, bart, inputs):
    """Compare logits, loss and every gradient."""
    expected, got = bart(**inputs), ours(**inputs)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    theirs = dict(bart.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.each_value
@pytest.mark.parametrize("lengths", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_parity_without_recurrence_logits_loss_and_all_gradients(bart, bart_folder, lengths, attention):
    ours = load(bart_folder, pre_seq_len=0)
    bart.set_attn_implementation(attention)
    ours.set_attn_implementation(attention)
    assert_same_numbers(ours, bart, document(lengths) | {"labels": labels()})


def test_parity_of_a_checkpoint_whose_stacks_have_embeddings_of_their_own(family, tmp_path):
    """Check untied embeddings: encoder, decoder and head each have a matrix, and the shared one is unused."""
    bart = plain_model(family, tie_word_embeddings=False)
    bart.save_pretrained(tmp_path)
    ours = load(tmp_path, pre_seq_len=0)
    assert_same_numbers(ours, bart, document((12, 7)) | {"labels": labels()})
    assert ours.model.encoder.embed_tokens.weight.grad.any()
    assert ours.model.shared.weight.grad is None


@pytest.mark.each_value
@pytest.mark.parametrize(
    "fields", [{"pre_seq_len": 0}, {"pre_seq_len": 3, "prefix_attention": "gated"}], ids=["no recurrence", "gated"]
)
@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_parity_of_generate(bart, bart_folder, fields, how):
    inputs = document((12, 7))
    ours = load(bart_folder, **fields)
    assert torch.equal(
        ours.generate(**inputs, **how, max_new_tokens=10), bart.generate(**inputs, **how, max_new_tokens=10)
    )


@pytest.mark.each_value
@pytest.mark.parametrize(
    "fields",
    [{}, {"prefix_projection": False}, {"update_gate": False}, {"associative_memory": True}],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_parity_of_a_converted_checkpoint_with_closed_gates(bart, bart_folder, fields):
    """Check that closed gates hide the prefix until training opens them."""
    ours = load(bart_folder, pre_seq_len=3, prefix_attention="gated", **fields)
    inputs = document((12, 7)) | {"labels": labels()}
    torch.testing.assert_close(ours(**inputs).logits, bart(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("associative_memory", [False, True])
def test_parity_of_a_converted_checkpoint_on_its_last_segment(bart, bart_folder, associative_memory):
    """Check that with closed gates the decoder sees only a long document's last segment."""
    ours = load(bart_folder, pre_seq_len=3, prefix_attention="gated", associative_memory=associative_memory)
    ids, targets = random_ids(2, 3, 16), labels()
    expected = bart(input_ids=ids[:, -1], labels=targets).logits
    torch.testing.assert_close(ours(input_ids=ids, labels=targets).logits, expected, rtol=0, atol=1e-5)


def test_parity_of_concat_with_bart_given_the_prefix_as_past_key_values(bart, bart_folder):
    """Compare `concat` with HF BART whose `past_key_values` hold the prefix."""
    ours = load(bart_folder, pre_seq_len=3, prefix_attention="concat")
    core = ours.model.encoder.recurrence
    torch.nn.init.normal_(core.projection_out, std=0.5)
    inputs = document((12, 7))
    state = core.initial_state(2)
    prefix = core.prefix_reader(state, ours.model.encoder.layers)
    cache = DynamicCache()
    for layer in range(ours.config.encoder_layers):
        # MBart's encoder does not number its layers
        bart.model.encoder.layers[layer].self_attn.layer_idx = layer
        cache.update(*prefix(layer, state[layer]), layer)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = bart.model.encoder(inputs["input_ids"], attention_mask=mask, past_key_values=cache).last_hidden_state
    got = ours.model.encoder(**inputs).last_hidden_state[:, 3:]
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], expected[seen], rtol=0, atol=1e-5)


def test_loading_keeps_every_weight_and_misses_the_new_ones_alone(bart, bart_folder):
    ours, report = load_with_report(bart_folder)
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert report["missing_keys"]
    assert all("recurrence." in name or "memory_gate" in name for name in report["missing_keys"])
    state = ours.state_dict()
    for name, tensor in bart.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_loading_a_bare_bart_model(bart, tmp_path):
    bart.model.save_pretrained(tmp_path)
    ours, report = RecurrentBartForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, **RECURRENT
    )
    assert not report["unexpected_keys"]
    assert all("recurrence." in name or "memory_gate" in name for name in report["missing_keys"])
    assert torch.equal(ours.model.shared.weight, bart.model.shared.weight)
    assert torch.equal(ours.lm_head.weight, bart.model.shared.weight)


# fields of these checkpoints' configurations on the hub that differ from BartConfig's defaults
LAYOUTS = {
    "bart-base": {"architectures": ["BartModel"], "forced_eos_token_id": 2, "scale_embedding": False},
    "bart-large": {
        "architectures": ["BartModel"],
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "task_specific_params": {"summarization": {"length_penalty": 2.0}},
    },
    "bart-large-cnn": {
        "architectures": ["BartForConditionalGeneration"],
        "force_bos_token_to_be_generated": True,
        "forced_bos_token_id": 0,
        "max_length": 142,
        "min_length": 56,
        "length_penalty": 2.0,
        "num_beams": 4,
        "early_stopping": True,
        "prefix": " ",
    },
}


# layouts of checkpoints of MBart: fields that differ from MBartConfig's defaults
MBARTS = {
    "ku-nlp": {"decoder_start_token_id": 2, "decoder_layers": 3},
    "mbart-large-cc25": {"scale_embedding": True},
    "mbart-large-50": {"scale_embedding": True, "decoder_start_token_id": 2, "activation_function": "relu"},
    "BARTpho": {"scale_embedding": True, "tie_word_embeddings": True, "encoder_layers": 2},
    "IndicBART": {"scale_embedding": True, "tie_word_embeddings": False, "d_model": 24},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
@pytest.mark.parametrize("fields", MBARTS.values(), ids=MBARTS)
def test_parity_of_the_layouts_of_mbart_on_the_hub(tmp_path, fields, form):
    mbart = plain_model("mbart", **fields)
    mbart.save_pretrained(tmp_path, max_shard_size="10KB" if form == "shards" else "1GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(mbart.state_dict(), tmp_path / "pytorch_model.bin")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "shards")
    ours, inputs = load(tmp_path, pre_seq_len=0), document((12, 7))
    # a language code ends each row of labels, as MBart's tokenizer writes them
    targets = torch.tensor([[9, 12, 33, 2, 58], [41, 2, 57, -100, -100]])
    assert_same_numbers(ours, mbart, inputs | {"labels": targets})
    for how in ({"decoder_start_token_id": 57}, {"forced_bos_token_id": 57, "num_beams": 3}):
        expected = mbart.generate(**inputs, **how, max_new_tokens=10)
        assert torch.equal(ours.generate(**inputs, **how, max_new_tokens=10), expected)


def test_the_output_and_hidden_states_of_each_layer_are_those_of_hugging_face(bart, bart_folder):
    ours, inputs = load(bart_folder, pre_seq_len=0), document((12, 12)) | {"labels": labels()}
    expected, found = (model(**inputs, output_hidden_states=True) for model in (bart, ours))
    for name in ("encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_segments_of_mbart_use_the_labels_of_their_own(tmp_path):
    """The first decoder input of each segment with a target is the segment's own last label."""
    mbart = plain_model("mbart")
    mbart.save_pretrained(tmp_path)
    ours = load(tmp_path, pre_seq_len=0)
    ids, targets = random_ids(2, 2, 8), torch.full((2, 2, 5), -100)
    targets[0, 0, :4], targets[0, 1, :5] = torch.tensor([9, 12, 2, 58]), torch.tensor([9, 12, 7, 2, 57])
    losses = [
        torch.nn.functional.cross_entropy(mbart(input_ids=ids[:1, t], labels=row).logits[0], row[0], reduction="sum")
        for t, row in enumerate((targets[:1, 0, :4], targets[:1, 1]))
    ]
    torch.testing.assert_close(ours(input_ids=ids, labels=targets).loss, sum(losses) / 9, rtol=0, atol=1e-5)


def test_decoder_inputs_of_mbart_beside_labels_begin_with_the_last_label(tmp_path):
    plain_model("mbart").save_pretrained(tmp_path)
    ours = load(tmp_path, pre_seq_len=0)
    targets = torch.tensor([[9, 12, 2, 58], [9, 2, 57, -100]])
    right = ours.prepare_decoder_input_ids_from_labels(targets)
    assert right.tolist() == [[58, 9, 12, 2], [57, 9, 2, 57]]
    inputs = document((12, 7)) | {"labels": targets}
    assert ours(**inputs, decoder_input_ids=right).loss == ours(**inputs).loss
    with pytest.raises(ValueError, match="row 1 begins with 58, but must begin with the last label=57"):
        ours(**inputs, decoder_input_ids=right.index_fill(1, torch.tensor([0]), 58))


def test_weights_without_final_norms_under_the_name_of_mbart_are_refused(tmp_path):
    plain_model("bart").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "mbart"}))
    with pytest.raises(ValueError, match=r"lacks model.decoder.layer_norm.bias.*MBart has a norm after the last layer"):
        load(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loading_the_layouts_of_the_hub(bart, tmp_path, layout):
    model = bart if layout["architectures"] == ["BartForConditionalGeneration"] else bart.model
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | layout))
    ours, report = RecurrentBartForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, **RECURRENT
    )
    assert not report["unexpected_keys"]
    assert torch.equal(ours.model.decoder.layers[1].fc1.weight, bart.model.decoder.layers[1].fc1.weight)
    assert ours.config.model_type == "recurrent_bart"
    assert ours.config.pre_seq_len == RECURRENT["pre_seq_len"]
    if "num_beams" in layout:
        assert ours.generation_config.num_beams == layout["num_beams"]
    assert ours.generate(random_ids(1, 20), max_new_tokens=5, min_length=0).shape[0] == 1


def test_the_missions_own_call_works_where_plain_bart_refuses_it(bart, tmp_path):
    fields = {
        "pre_seq_len": 20,
        "input_size": 512,
        "segment_size": 512,
        "max_n_segments": 3,
        "bptt_depth": 2,
        "prefix_projection": False,
    }
    BartForConditionalGeneration(BartConfig(**PLAIN | {"max_position_embeddings": 600})).save_pretrained(tmp_path)
    ours = RecurrentBartForConditionalGeneration.from_pretrained(tmp_path, **fields)
    assert {name: getattr(ours.config, name) for name in fields} == fields
    assert ours(input_ids=random_ids(1, 1100), labels=random_ids(1, 4)).loss.isfinite()
    with pytest.raises(TypeError, match="pre_seq_len"):
        BartForConditionalGeneration.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("fields", [{}, {"normalize_before": True, "wraps_last_label": True}], ids=["bart", "mbart"])
def test_save_and_load_round_trip_through_the_auto_classes(make_model, tmp_path, fields):
    model = make_model(**fields).float()
    inputs = {"input_ids": random_ids(2, 30), "labels": random_ids(2, 4)}
    model.save_pretrained(tmp_path)
    again, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is RecurrentBartForConditionalGeneration
    assert not any(report.values())
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "recurrent_bart"


def test_new_parameters_are_initialised_alike_from_scratch_and_on_a_checkpoint(bart_folder):
    """Build models on the meta device, which loses values set in `__init__`."""
    config = RecurrentBartConfig(**TINY | RECURRENT, prefix_attention="gated")
    converted = load(bart_folder, pre_seq_len=3, prefix_attention="gated")
    for model in (RecurrentBartForConditionalGeneration(config), converted):
        core = model.model.encoder.recurrence
        assert 0.2 < core.initial_memory.std() < 0.4
        assert 0.2 < core.projection_out.std() < 0.4
        assert core.prefix_gate.count_nonzero() == 0
        assert core.update_gate_bias.count_nonzero() == 0
        assert model.model.decoder.layers[0].encoder_attn.memory_gate.count_nonzero() == 0
