"""Tests of the models' hidden states and attention weights, stacked over segments."""

import pytest
import torch

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from tiny import TINY, random_ids

N_LAYERS, N_HEADS, WIDTH, N_SLOTS = 3, 4, 16, 3
FIELDS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "top": {"prefix_attention": "gated", "recurrence": "top"},
    "static": {"prefix_attention": "gated", "recurrence": "none"},
    "no recurrence": {"pre_seq_len": 0},
}
WANTED = {"output_attentions": True, "output_hidden_states": True}


@pytest.fixture
def documents():
    """Return documents of different numbers of segments and tokens, with targets after them."""
    mask = torch.ones(2, 3, 8, dtype=torch.long)
    mask[1, 2:] = mask[0, 2, 5:] = 0
    return {"input_ids": random_ids(2, 3, 8), "attention_mask": mask, "labels": random_ids(2, 5)}


@pytest.fixture
def make_eager(make_model):
    """Return `make_model` with the eager back end."""

    def make(**changes):
        model = make_model(**changes)
        model.set_attn_implementation("eager")
        return model

    return make


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_shapes_of_all_outputs(make_eager, documents, fields):
    output = make_eager(**fields)(**documents, **WANTED)
    n_prefix = fields.get("pre_seq_len", N_SLOTS)
    n_memory = 0 if "static" in fields or fields.get("recurrence") == "none" else n_prefix
    found = {name: [tuple(part.shape) for part in output[name]] for name in output if "attentions" in name}
    assert found == {
        "encoder_attentions": [(2, 3, N_HEADS, 8, n_prefix + 8)] * N_LAYERS,
        "decoder_attentions": [(2, N_HEADS, 5, 5)] * 2,
        "cross_attentions": [(2, N_HEADS, 5, n_memory + 8)] * 2,
    }
    assert [tuple(part.shape) for part in output.encoder_hidden_states] == [(2, 3, 8, WIDTH)] * (N_LAYERS + 1)
    assert [tuple(part.shape) for part in output.decoder_hidden_states] == [(2, 5, WIDTH)] * 3


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_the_last_hidden_state_is_what_the_decoder_sees_and_the_first_is_the_embedded_segment(
    make_eager, documents, fields
):
    model = make_eager(**fields)
    output = model(**documents, **WANTED)
    context = output.encoder_last_hidden_state[:, -8:]
    # index of each document's last segment
    for row, last in enumerate((2, 1)):
        assert torch.equal(output.encoder_hidden_states[-1][row, last], context[row])
    encoder = model.model.encoder
    embedded = encoder.layernorm_embedding(
        model.model.shared(documents["input_ids"][0, 1]) + encoder.embed_positions(documents["input_ids"][:1, 1])[0]
    )
    torch.testing.assert_close(output.encoder_hidden_states[0][0, 1], embedded)


def test_hidden_states_of_segments_are_those_of_reading_one_after_the_other(make_eager, documents):
    encoder, ids = make_eager().model.encoder, documents["input_ids"]
    whole = encoder(ids, output_hidden_states=True)
    state = None
    for number in range(3):
        part = encoder(ids[:, number : number + 1], state=state, output_hidden_states=True)
        state = part.state
        for found, expected in zip(whole.hidden_states, part.hidden_states, strict=True):
            torch.testing.assert_close(found[:, number], expected[:, 0])


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_weights_of_tokens_sum_to_1_and_padding_has_none(make_eager, documents, fields):
    is_concat = fields.get("prefix_attention") == "concat"
    n_prefix = fields.get("pre_seq_len", N_SLOTS)
    model = make_eager(**fields)
    attentions = model(**documents, **WANTED).encoder_attentions
    read = documents["attention_mask"].bool().any(-1)
    for layer, weights in enumerate(attentions):
        tokens = weights[..., 0 if is_concat else n_prefix :]
        torch.testing.assert_close(tokens[read].sum(-1), torch.ones_like(tokens[read].sum(-1)))
        assert weights[0, 2, :, :, n_prefix + 5 :].abs().max() == 0
        if n_prefix and not is_concat:
            gate = torch.tanh(model.model.encoder.recurrence.prefix_gate[layer])
            prefix = weights[..., :n_prefix].sum(-1)
            torch.testing.assert_close(prefix, gate.view(-1, 1).expand_as(prefix))


def test_weights_give_what_was_read(make_eager):
    """Recompute a layer's output from the attention weights."""
    model, ids = make_eager(), random_ids(1, 1, 8)
    encoder = model.model.encoder
    output = encoder(ids, **WANTED)
    first, layer = output.hidden_states[0][0, 0], encoder.layers[0]
    attention, core = layer.self_attn, encoder.recurrence
    state = core.initial_state(1)
    _, prefix_value = core.prefix_reader(state, encoder.layers)(0, state[0])
    value = torch.cat([prefix_value[0], attention.v_proj(first).view(8, N_HEADS, -1).transpose(0, 1)], dim=1)
    read = (output.attentions[0][0, 0] @ value).transpose(0, 1).flatten(1)
    stream = layer.self_attn_layer_norm(first + attention.out_proj(read))
    stream = layer.final_layer_norm(stream + layer.fc2(layer.activation_fn(layer.fc1(stream))))
    torch.testing.assert_close(output.hidden_states[1][0, 0], stream)


def test_gradient_reaches_the_segments_through_hidden_states_and_weights(make_eager, documents):
    model = make_eager()
    output = model(**documents, **WANTED)
    (output.encoder_hidden_states[2][:, 0].sum() + output.encoder_attentions[1][:, 0].square().sum()).backward()
    assert model.model.encoder.layers[0].fc1.weight.grad.abs().max() > 0


def test_outputs_may_be_asked_for_by_the_configuration(make_eager, documents):
    model = make_eager()
    expected = model(**documents, **WANTED)
    model.config.output_hidden_states = model.config.output_attentions = True
    found = model(**documents)
    for name in ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "cross_attentions"):
        assert all(torch.equal(*pair) for pair in zip(found[name], expected[name], strict=True)), name
    assert "encoder_hidden_states" not in model(**documents, output_hidden_states=False)


def test_a_plain_tuple_holds_the_same(make_eager, documents):
    model = make_eager()
    output = model(**documents, **WANTED)
    plain = model(**documents, **WANTED, return_dict=False)
    named = dict(zip(output, plain, strict=True))
    assert torch.equal(named["logits"], output.logits)
    assert torch.equal(named["encoder_hidden_states"][1], output.encoder_hidden_states[1])
    assert torch.equal(named["state"].memory, output.state.memory)


def test_the_gradient_horizon_takes_no_segment_out_of_the_outputs(make_eager, documents):
    """Check that segments without an autograd graph have outputs too."""
    expected = make_eager()(**documents, **WANTED)
    torch.manual_seed(0)
    model = make_eager()
    model.config.bptt_depth = 0
    assert model(**documents, **WANTED).encoder_attentions[0].shape == expected.encoder_attentions[0].shape


def test_back_ends_without_weights_give_none_and_say_so(make_model, documents, monkeypatch):
    from recurrent_bart.model import modeling_encoder

    said = []
    monkeypatch.setattr(modeling_encoder.logger, "warning_once", said.append)
    output = make_model()(**documents, **WANTED)
    assert not output.get("encoder_attentions")
    assert len(output.encoder_hidden_states) == N_LAYERS + 1
    assert said == ["output_attentions: sdpa returns no attention weights; use eager attention"]


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generate_gives_them_too(make_eager, documents, how):
    model = make_eager()
    documents.pop("labels")
    output = model.generate(**documents, **how, **WANTED, return_dict_in_generate=True, max_new_tokens=4)
    expected = model.model.encoder(**documents, **WANTED)
    for found, name in ((output.encoder_hidden_states, "hidden_states"), (output.encoder_attentions, "attentions")):
        assert all(torch.equal(*pair) for pair in zip(found, expected[name], strict=True))
    # indexed by step, then by layer
    assert output.decoder_hidden_states[1][2].shape == (2 * how["num_beams"], 1, WIDTH)
    assert output.cross_attentions[1][1].shape == (2 * how["num_beams"], N_HEADS, 1, N_SLOTS + 8)


def test_generate_takes_the_wish_from_its_configuration(make_eager, documents):
    model = make_eager()
    documents.pop("labels")
    model.generation_config.output_hidden_states = model.generation_config.return_dict_in_generate = True
    output = model.generate(**documents, max_new_tokens=4)
    assert output.encoder_hidden_states[0].shape == (2, 3, 8, WIDTH)
    assert output.encoder_attentions is None


@pytest.mark.parametrize("as_embeddings", [False, True], ids=["ids", "embeddings"])
def test_without_recurrence_outputs_of_one_segment_are_barts(bart, as_embeddings):
    """Compare names, shapes and values; segmented documents keep the segment dimension."""
    model = RecurrentBartForConditionalGeneration(RecurrentBartConfig(**TINY, pre_seq_len=0)).eval()
    model.load_state_dict(bart.state_dict())
    for one in (model, bart):
        one.set_attn_implementation("eager")
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"attention_mask": mask, "decoder_input_ids": random_ids(2, 5)}
    inputs |= {"inputs_embeds": bart.model.shared(ids)} if as_embeddings else {"input_ids": ids}
    found, expected = (one(**inputs, **WANTED) for one in (model, bart))
    assert list(found) == list(expected)
    for name in ("encoder_hidden_states", "encoder_attentions", "decoder_hidden_states", "cross_attentions"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
    encoded = model.get_encoder()(ids, mask, **WANTED)
    assert encoded.hidden_states[0].shape == (2, 8, WIDTH)
    assert model.get_encoder()(ids.view(2, 1, 8), **WANTED).hidden_states[0].shape == (2, 1, 8, WIDTH)
