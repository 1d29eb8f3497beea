"""Targets at segments that a document does not have, and encoder outputs that were computed for other targets."""

import pytest
import torch

from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from tiny import batch_of, random_ids

CONTEXTS = ["last", "memory", "section", "all"]
of_every_context = pytest.mark.parametrize("name", CONTEXTS)


@pytest.fixture
def inputs():
    """Return documents of three segments and of one, with a label at each segment that a document has."""
    _, ids, mask = batch_of([[8, 8, 3], [5]])
    labels = random_ids(2, 3, 4).masked_fill(~mask.bool().any(-1, keepdim=True), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@of_every_context
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_labels_at_a_segment_without_text_are_refused(make_model, inputs, name, schedule):
    model = make_model(decoder_context=name, schedule=schedule).train()
    assert model(**inputs).loss.isfinite()
    inputs["labels"][1, 2, 1] = 7
    with pytest.raises(ValueError, match=r"document 1 has a target at segment 2 .* the document has 1 segments"):
        model(**inputs)
    # documents given flat, and documents in which padding stands in front
    flat = {"input_ids": random_ids(2, 16), "attention_mask": torch.ones(2, 16), "labels": random_ids(2, 2, 4)}
    flat["attention_mask"][1, 8:] = 0
    with pytest.raises(ValueError, match="document 1 has a target at segment 1"):
        model(**flat)
    inputs["labels"][1, 2] = -100
    inputs["attention_mask"][1] = inputs["attention_mask"][1].roll(1, dims=0)
    with pytest.raises(ValueError, match="document 1 has a target at segment 0"):
        model(**inputs)


def test_labels_at_a_gap_in_a_document_are_refused(make_model, inputs):
    inputs["attention_mask"][0, 1] = 0
    with pytest.raises(ValueError, match=r"document 0 has a target at segment 1 .* the document has 2 segments"):
        make_model()(**inputs)


def test_labels_of_a_document_that_a_state_ends_are_refused(make_model, inputs):
    model = make_model()
    state = model.model.encode(random_ids(2, 1, 8)).state
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"document 1 has a target at segment 0 .* the document has 0 segments"):
        model(**inputs, state=state)
    inputs["labels"][1] = -100
    assert model(**inputs, state=state).loss.isfinite()


@pytest.mark.parametrize("oracle", [None, Oracle("word", gold_probability=0.5)], ids=["none", "word"])
@pytest.mark.parametrize("is_encoded", [False, True])
def test_one_target_at_a_segment_without_text_is_refused(make_model, inputs, oracle, is_encoded):
    """Check also encoder outputs, which `encode` returns because `generate` skips these targets."""
    model, labels = make_model().train(), inputs.pop("labels")[:, 0]
    target_segments = torch.tensor([[False, True, False], [False, False, True]])
    given = inputs | {"target_segments": target_segments}
    if is_encoded:
        given = {"encoder_outputs": model.model.encode(**given)}
    with pytest.raises(ValueError, match="document 1 has a target at segment 2"):
        model(**given, labels=labels, oracle=oracle)


def test_an_oracle_needs_one_target_for_each_document_too(make_model, inputs):
    model, labels = make_model().train(), inputs.pop("labels")[:, 0]
    target_segments = torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ValueError, match="each document needs exactly one True"):
        model(**inputs, target_segments=target_segments, labels=labels, oracle=Oracle("word", gold_probability=0.5))


# other targets with as many contexts, and the documents' last segments
CHOSEN = {
    "as many": torch.tensor([[True, False, True], [False, False, False]]),
    "one each": torch.tensor([[True, False, False], [True, False, False]]),
    "last": torch.tensor([[False, False, True], [True, False, False]]),
}


@pytest.mark.each_value
@of_every_context
@pytest.mark.parametrize("read_at", [*CHOSEN, "last_segment", "every_segment"])
@pytest.mark.parametrize("told_at", [*CHOSEN, "last_segment", "every_segment"])
def test_encoder_outputs_give_the_texts_of_their_own_targets_only(make_model, inputs, name, read_at, told_at):
    model = make_model(decoder_context=name)
    inputs.pop("labels")

    def selection(at):
        return {"target_segments": CHOSEN[at]} if at in CHOSEN else {"decode_at": at}

    # also as a plain tuple
    forms = [model.model.encode(**inputs, **selection(read_at))]
    forms.append(forms[0].as_tuple())
    for encoded in forms:
        given = {"encoder_outputs": encoded, **selection(told_at), "max_new_tokens": 4}
        # contexts after every segment include the context of each target, except with sections
        if read_at == told_at or (read_at == "every_segment" and told_at in CHOSEN and name != "section"):
            expected = model.generate(**inputs, **selection(told_at), max_new_tokens=4)
            assert torch.equal(model.generate(**given), expected)
        else:
            with pytest.raises(ValueError, match="encoder_outputs of shape"):
                model.generate(**given)


def test_a_forward_pass_refuses_encoder_outputs_of_other_targets(make_model, inputs):
    model, labels = make_model(), inputs.pop("labels")[:, 0]
    encoded = {at: model.model.encode(**inputs, target_segments=chosen) for at, chosen in CHOSEN.items()}
    for at, other in (("one each", "last"), ("last", "one each")):
        found = model(encoder_outputs=encoded[at], labels=labels, target_segments=CHOSEN[at]).logits
        assert torch.equal(found, model(**inputs, labels=labels, target_segments=CHOSEN[at]).logits)
        with pytest.raises(ValueError, match="encoder_outputs of shape"):
            model(encoder_outputs=encoded[at], labels=labels, target_segments=CHOSEN[other])
    with pytest.raises(ValueError, match="each document needs exactly one True"):
        model(encoder_outputs=encoded["as many"], labels=labels)
    with pytest.raises(ValueError, match="encoder_outputs of shape"):
        model(encoder_outputs=model.model.encode(**inputs), labels=labels, target_segments=CHOSEN["one each"])


def test_generation_gives_no_text_at_a_segment_without_text(make_model, inputs):
    model = make_model()
    inputs.pop("labels")
    state = RecurrentState.unread(model.config, 2)
    texts = model.generate(**inputs, state=state, decode_at="every_segment", max_new_tokens=4)
    assert (texts[1, 1:] == model.config.pad_token_id).all()
