"""Tests that `generate` on documents of several segments behaves as Hugging Face's on short inputs."""

import pytest
import torch
from transformers import GenerationMixin

from recurrent_bart.model import decoder_context
from tiny import random_ids

FIELDS = {
    "gated": {"prefix_attention": "gated"},
    "concat": {"prefix_attention": "concat"},
    "memory": {"decoder_context": "memory"},
    "all": {"decoder_context": "all"},
    "section": {"decoder_context": "section"},
    "no recurrence": {"pre_seq_len": 0},
}
HOW = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "penalised": {"num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
}
N_NEW = 8


@pytest.fixture
def documents():
    """Return documents of three, one and two segments."""
    mask = torch.ones(3, 3, 8, dtype=torch.long)
    mask[1, 1:] = mask[2, 2:] = mask[0, 2, 5:] = mask[1, 0, 3:] = 0
    return {"input_ids": random_ids(3, 3, 8), "attention_mask": mask}


def alone(documents, row):
    """Return one document without padding segments."""
    is_read = documents["attention_mask"][row].bool().any(-1)
    return {name: tensor[row, is_read].unsqueeze(0) for name, tensor in documents.items()}


def generate(model, documents, **how):
    torch.manual_seed(1)
    return model.generate(**documents, **{"max_new_tokens": N_NEW} | how)


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_the_cache_changes_no_id(make_model, documents, fields, how):
    model = make_model(**fields)
    how = how | {"return_dict_in_generate": True, "output_scores": True}
    found, recomputed = generate(model, documents, **how), generate(model, documents, **how, use_cache=False)
    assert torch.equal(found.sequences, recomputed.sequences)
    for scores, expected in zip(found.scores, recomputed.scores, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    # equal scores would hide a cache of the wrong row
    assert len(found.scores[0].unique(dim=0)) > 1


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_greedy_ids_are_those_of_the_logits(make_model, documents, fields):
    """Compare with `forward` on the whole prefix for every id."""
    model = make_model(**fields)
    ids = torch.full((3, 1), model.config.decoder_start_token_id)
    for _ in range(N_NEW):
        logits = model(**documents, decoder_input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    found = generate(model, documents, eos_token_id=None, forced_eos_token_id=None)
    assert torch.equal(found, ids)


@pytest.mark.each_value
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_a_ragged_batch_gives_what_its_documents_give_alone(make_model, documents, fields, how):
    model = make_model(**fields)
    together = generate(model, documents, **how)
    for row in range(3):
        (single,) = generate(model, alone(documents, row), **how)
        assert torch.equal(together[row, : len(single)], single)
        assert (together[row, len(single) :] == model.config.pad_token_id).all()


def test_a_given_mask_holds_also_where_ids_hold_the_pad_id(make_model, documents):
    """The mask shows a pad id and hides a token; `forward` takes the mask as it is."""
    model = make_model()
    ids, mask = documents["input_ids"], documents["attention_mask"]
    ids[0, 0, 2], mask[2, 0, 5:] = model.config.pad_token_id, 0
    assert mask[0, 0, 2] == 1
    assert (ids[2, 0, 5:] != model.config.pad_token_id).all()
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    expected = model(**documents, decoder_input_ids=start).logits[:, -1]
    how = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    # `generate` returns logits in float32
    torch.testing.assert_close(generate(model, documents, **how).logits[0], expected.float(), rtol=0, atol=1e-6)
    inferred = generate(model, {"input_ids": ids}, **how).logits[0]
    as_pads = model(ids, attention_mask=ids.ne(model.config.pad_token_id).long(), decoder_input_ids=start).logits[:, -1]
    torch.testing.assert_close(inferred, as_pads.float(), rtol=0, atol=1e-6)
    assert ((inferred - expected).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("decode_at", ["last_segment", "every_segment"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_the_context_is_projected_once_while_a_text_is_generated(make_model, documents, how, decode_at):
    model = make_model()
    n_rows = []
    for layer in model.model.decoder.layers:
        for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            projection.register_forward_hook(lambda module, args, output: n_rows.append(len(output)))
    # without an end token, so that a call too many per token would be visible
    generate(model, documents, **how, decode_at=decode_at, eos_token_id=None, forced_eos_token_id=None)
    n_contexts = (
        int(documents["attention_mask"].any(-1).sum()) if decode_at == "every_segment" else len(documents["input_ids"])
    )
    n_projections = 2 * model.config.decoder_layers
    assert n_rows == [n_contexts * how.get("num_beams", 1)] * n_projections


def test_flat_ids_give_what_their_segments_give(make_model):
    model = make_model()
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    ids[1, 12:] = model.config.pad_token_id
    found = generate(model, {"input_ids": ids}, num_beams=2)
    assert torch.equal(found, generate(model, {"input_ids": ids, "attention_mask": mask}, num_beams=2))
    (single,) = generate(model, {"input_ids": ids[1:, :12]}, num_beams=2)
    assert torch.equal(found[1, : len(single)], single)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}], ids=["beam", "sampling"])
def test_several_sequences_of_each_document_stand_one_behind_the_other(make_model, documents, how):
    model = make_model()
    found = generate(model, documents, **how, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.shape == (6, N_NEW + 1)
    if "num_beams" in how:
        best = generate(model, documents, **how)
        assert torch.equal(found.sequences[::2, : best.shape[1]], best)
        assert (found.sequences_scores[::2] >= found.sequences_scores[1::2]).all()


def test_scores_are_those_of_forward_on_what_was_generated(make_model, documents):
    """Check greedy and beam search; each row must use its document's context."""
    model = make_model()
    wanted = {"return_dict_in_generate": True, "output_scores": True, "forced_eos_token_id": None}
    greedy = generate(model, documents, **wanted, output_logits=True, eos_token_id=None)
    logits = model(**documents, decoder_input_ids=greedy.sequences[:, :-1]).logits
    # generate stores logits in float32
    torch.testing.assert_close(torch.stack(greedy.logits, dim=1), logits.float())
    beam = generate(model, documents, **wanted, num_beams=3, length_penalty=0.0, eos_token_id=None)
    logits = model(**documents, decoder_input_ids=beam.sequences[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(2, beam.sequences[:, 1:].unsqueeze(2)).sum((1, 2))
    torch.testing.assert_close(beam.sequences_scores, chosen.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.each_value
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_generate_from_a_state_goes_on_as_the_whole_document(make_model, documents, fields, how):
    model, ids = make_model(**fields), documents["input_ids"]
    read = model.model.encode(ids[:, :2])
    found = generate(model, {"input_ids": ids[:, 2:], "state": read.state}, **how)
    assert torch.equal(found, generate(model, {"input_ids": ids}, **how))


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_after_every_segment_stands_what_reading_so_far_gives(make_model, documents, fields, how):
    model = make_model(**fields)
    texts_BNT = generate(model, documents, **how, decode_at="every_segment")
    for row in range(3):
        whole = alone(documents, row)
        for number in range(whole["input_ids"].shape[1]):
            (single,) = generate(model, {name: tensor[:, : number + 1] for name, tensor in whole.items()}, **how)
            assert torch.equal(texts_BNT[row, number, : len(single)], single)
    assert (texts_BNT[~documents["attention_mask"].bool().any(-1)] == model.config.pad_token_id).all()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_after_chosen_segments_stands_what_stands_there_after_every_one(make_model, documents, how):
    """Select also a segment that its document does not have."""
    model = make_model()
    chosen = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1]]).bool()
    n_texts = how.get("num_return_sequences", 1)
    expected = generate(model, documents, **how, decode_at="every_segment")
    found = generate(model, documents, **how, target_segments=chosen)
    is_shown = (chosen & documents["attention_mask"].bool().any(-1)).repeat_interleave(n_texts, dim=0)
    assert is_shown.sum() == 3 * n_texts
    length = found.shape[2]
    assert torch.equal(found[is_shown], expected[is_shown][:, :length])
    assert (found[~is_shown] == model.config.pad_token_id).all()
    read = model.model.encode(**documents, decode_at="every_segment")
    assert torch.equal(found, generate(model, {"encoder_outputs": read}, **how, target_segments=chosen))
    with pytest.raises(ValueError, match="the selected segments hold no text"):
        generate(model, documents, target_segments=torch.zeros(3, 3).bool())


@pytest.mark.each_value
@pytest.mark.parametrize("fields", [{}, {"prefix_attention": "gated"}, {"recurrence": "none"}], ids=str)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_sections_of_similar_length_together_give_the_same_ids(make_model, monkeypatch, how, fields):
    """Generate texts of several lengths per group; select also a segment that its document does not have."""
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    model = make_model(decoder_context="section", **fields)
    mask = torch.ones(3, 6, 8, dtype=torch.long)
    mask[1, 4:] = mask[2, 1:] = mask[0, 5, 5:] = 0
    documents = {"input_ids": random_ids(3, 6, 8), "attention_mask": mask}
    chosen = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0]]).bool()
    contexts, generate_rows = [], GenerationMixin.generate

    def recorded(model, *inputs, encoder_outputs, **settings):
        contexts.append(encoder_outputs.last_hidden_state.shape[:2])
        return generate_rows(model, *inputs, encoder_outputs=encoder_outputs, **settings)

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    rows = generate(model, documents, **how, target_segments=chosen)
    packed = generate(model, documents, **how, target_segments=chosen, may_pack=True)
    n_slots = contexts[0][1] - 4 * 8
    assert contexts == [(5, n_slots + 32), (2, n_slots + 8), (3, n_slots + 32)]
    assert torch.equal(packed, rows)
    assert len(rows.unique(dim=1)) > 1
    # a dictionary has one row per text, so contexts are not packed
    more = generate(model, documents, **how, target_segments=chosen, may_pack=True, return_dict_in_generate=True)
    assert torch.equal(more.sequences, rows)
    begun = torch.full((5, 1), 2)
    generate(model, documents, target_segments=chosen, may_pack=True, decoder_input_ids=begun)
    assert [size[0] for size in contexts[3:]] == [5, 5]


def test_several_sequences_after_every_segment(make_model, documents):
    """Check that there are documents times sequences rows, as without segments."""
    model = make_model()
    texts = generate(model, documents, num_beams=3, num_return_sequences=2, decode_at="every_segment")
    best = generate(model, documents, num_beams=3, decode_at="every_segment")
    assert texts.shape[:2] == (6, 3)
    assert torch.equal(texts[::2, :, : best.shape[2]], best)
    assert not torch.equal(texts[::2], texts[1::2])


def test_a_dictionary_after_every_segment_has_a_row_for_each_that_was_read(make_model, documents):
    model = make_model()
    found = generate(model, documents, decode_at="every_segment", return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, generate(model, documents, decode_at="every_segment"))
    assert found.scores[0].shape == (3 + 1 + 2, 60)


def test_embeddings_in_place_of_ids(make_model, documents):
    model = make_model()
    embeddings = model.model.shared(documents["input_ids"])
    found = generate(model, {"inputs_embeds": embeddings, "attention_mask": documents["attention_mask"]}, num_beams=2)
    assert torch.equal(found, generate(model, documents, num_beams=2))


def test_what_was_encoded_before_can_be_given(make_model, documents):
    model = make_model()
    encoded = model.model.encode(**documents)
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(generate(model, {"encoder_outputs": encoded}, **how), generate(model, documents, **how))


def test_a_static_cache_gives_the_same_ids(make_model, documents):
    model = make_model().float()
    found = generate(model, documents, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, generate(model, documents))
