"""Tests of changes to segmented documents that must, or must not, change an output."""

import pytest
import torch

from tiny import random_ids

N_SEGMENTS, LENGTH = 3, 8


@pytest.fixture
def documents():
    """Return two documents of three segments."""
    return random_ids(2, N_SEGMENTS, LENGTH)


def loss_of(model, input_ids, attention_mask=None, **inputs):
    return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).loss


def test_first_segment_changes_the_loss_at_the_third_and_its_gradient(make_model, documents):
    model, labels = make_model(), random_ids(2, 4)
    embeds = model.model.shared(documents).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=labels).loss
    loss.backward()
    assert (embeds.grad[:, 0].abs().amax(dim=-1) > 1e-9).all()
    changed = documents.clone()
    changed[0, 0, 3] = (changed[0, 0, 3] + 1) % 50 + 4
    assert (loss_of(model, changed, labels=labels) - loss).abs() > 1e-6


def test_first_segment_is_forgotten_without_recurrence(make_model, documents):
    model, labels = make_model(pre_seq_len=0), random_ids(2, 4)
    changed = documents.clone()
    changed[:, 0] = random_ids(2, LENGTH)
    assert loss_of(model, changed, labels=labels) == loss_of(model, documents, labels=labels)


def test_tokens_never_see_slots(make_model, documents):
    """Check that with a closed prefix tokens get BART's hidden states for any slots."""
    model = make_model(prefix_attention="gated")
    core = model.model.encoder.recurrence
    torch.nn.init.zeros_(core.prefix_gate)
    before = model.model.encoder(documents).last_hidden_state[:, 3:]
    torch.nn.init.normal_(core.slot_embedding)
    after = model.model.encoder(documents)
    assert torch.equal(after.last_hidden_state[:, 3:], before)
    assert not torch.equal(after.state.memory, model.model.encoder(documents[:, :1]).state.memory)


@pytest.mark.parametrize("attention", ["gated", "concat"])
def test_padding_content_changes_nothing(make_model, documents, attention):
    model, labels = make_model(prefix_attention=attention), random_ids(2, 4)
    mask = torch.ones_like(documents)
    mask[0, 2, 5:] = 0
    mask[1, 1:] = 0
    expected = loss_of(model, documents, mask, labels=labels)
    other = torch.where(mask.bool(), documents, random_ids(*documents.shape))
    assert loss_of(model, other, mask, labels=labels) == expected


@pytest.mark.parametrize("attention", ["gated", "concat"])
def test_an_ended_document_neither_changes_nor_is_changed_by_its_neighbours(make_model, documents, attention):
    model, labels = make_model(prefix_attention=attention), random_ids(2, 4)
    mask = torch.ones_like(documents)
    mask[1, 1:] = 0
    logits = model(input_ids=documents, attention_mask=mask, labels=labels).logits
    alone = [
        model(input_ids=documents[:1], labels=labels[:1]).logits,
        model(input_ids=documents[1:, :1], labels=labels[1:]).logits,
    ]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-12)


def test_an_ended_document_gets_no_gradient_from_its_neighbours(make_model, documents):
    model, labels = make_model(), random_ids(2, 4)
    mask = torch.ones_like(documents)
    mask[1, 1:] = 0
    embeds = model.model.shared(documents).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits
    logits[0].sin().sum().backward()
    assert embeds.grad[1].abs().max() == 0
    assert (embeds.grad[0].abs().amax(dim=(1, 2)) > 0).all()


def test_an_ended_document_keeps_its_state(make_model, documents):
    model = make_model()
    mask = torch.ones_like(documents)
    mask[1, 1:] = 0
    state = model.model.encoder(documents, attention_mask=mask).state
    short = model.model.encoder(documents[1:, :1]).state
    torch.testing.assert_close(state.memory[1:], short.memory, rtol=0, atol=1e-12)
    assert state.position.tolist() == [3, 1]


def test_empty_segments_in_front_and_behind_are_the_same(make_model, documents):
    model, labels = make_model(), random_ids(2, 4)
    mask = torch.ones_like(documents)
    behind, in_front = mask.clone(), mask.clone()
    behind[1, 2] = 0
    in_front[1, 0] = 0
    shifted = documents.clone()
    shifted[1, 1:] = documents[1, :2]
    torch.testing.assert_close(
        loss_of(model, documents, behind, labels=labels),
        loss_of(model, shifted, in_front, labels=labels),
        rtol=0,
        atol=1e-12,
    )


def test_row_order_changes_nothing(make_model, documents):
    model, labels = make_model(), random_ids(2, 4)
    mask = torch.ones_like(documents)
    mask[1, 2, 4:] = 0
    logits = model(input_ids=documents, attention_mask=mask, labels=labels).logits
    flipped = model(input_ids=documents.flip(0), attention_mask=mask.flip(0), labels=labels.flip(0)).logits
    torch.testing.assert_close(flipped.flip(0), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("associative_memory", [False, True])
def test_a_state_continues_to_the_same_numbers(make_model, associative_memory):
    model, ids, labels = make_model(associative_memory=associative_memory), random_ids(2, 5, LENGTH), random_ids(2, 4)
    whole = model(input_ids=ids, labels=labels)
    first = model.model.encoder(ids[:, :2]).state
    second = model(input_ids=ids[:, 2:], labels=labels, state=first.detach())
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(second.state.memory, whole.state.memory, rtol=0, atol=1e-12)
    assert second.state.position.tolist() == [5, 5]


def test_a_state_continues_in_generate(make_model):
    model, ids = make_model(), random_ids(2, 5, LENGTH)
    state = model.model.encoder(ids[:, :2]).state
    how = {"num_beams": 2, "max_new_tokens": 6}
    assert torch.equal(model.generate(ids[:, 2:], state=state, **how), model.generate(ids, **how))


def test_flat_documents_are_those_cut_by_hand(make_model):
    """Check that every segment gets the special tokens at the document's ends."""
    model, labels = make_model(), random_ids(1, 4)
    bos, eos, text = torch.tensor([[0]]), torch.tensor([[2]]), random_ids(1, 15)
    flat = torch.cat([bos, text, eos], dim=1)
    segments = [torch.cat([bos, part, eos], dim=1) for part in (text[:, :6], text[:, 6:12])]
    last = torch.cat([bos, text[:, 12:], eos, torch.ones(1, 3, dtype=torch.long)], dim=1)
    by_hand = torch.stack([*segments, last], dim=1)
    mask = torch.ones_like(by_hand)
    mask[0, 2, 5:] = 0
    expected = model(input_ids=by_hand, attention_mask=mask, labels=labels)
    got = model(input_ids=flat, labels=labels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)
    assert torch.equal(
        model.generate(flat, num_beams=2, max_new_tokens=5),
        model.generate(by_hand, attention_mask=mask, num_beams=2, max_new_tokens=5),
    )


def test_labels_per_segment_are_decoded_from_their_own_segments(make_model, documents):
    model, labels = make_model(), random_ids(2, N_SEGMENTS, 4)
    labels[0, 1] = -100
    labels[1, 2, 2:] = -100
    mask = torch.ones_like(documents)
    output = model(input_ids=documents, attention_mask=mask, labels=labels)
    total, count = 0.0, 0
    for row, segment in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        own = labels[row : row + 1, segment]
        single = model(input_ids=documents[row : row + 1, : segment + 1], labels=own)
        torch.testing.assert_close(output.logits[row, segment], single.logits[0], rtol=0, atol=1e-12)
        n_targets = int((own != -100).sum())
        total, count = total + single.loss * n_targets, count + n_targets
    torch.testing.assert_close(output.loss, total / count, rtol=0, atol=1e-12)
    assert output.logits[0, 1].abs().max() == 0


def test_generate_after_every_segment(make_model, documents):
    model = make_model()
    mask = torch.ones_like(documents)
    mask[1, 2] = 0
    texts = model.generate(documents, attention_mask=mask, decode_at="every_segment", num_beams=2, max_new_tokens=6)
    assert texts.shape[:2] == (2, N_SEGMENTS)
    for row, segment in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        alone = model.generate(documents[row : row + 1, : segment + 1], num_beams=2, max_new_tokens=6)[0]
        expected = torch.nn.functional.pad(alone, (0, texts.shape[-1] - len(alone)), value=1)
        assert torch.equal(texts[row, segment], expected)
    assert (texts[1, 2] == model.config.pad_token_id).all()


def test_documents_are_cut_in_training_alone(make_model):
    model, labels = make_model(max_n_segments=2), random_ids(1, 4)
    flat = random_ids(1, 8 * 4)
    cut, whole = loss_of(model, flat[:, :16], labels=labels), loss_of(model, flat, labels=labels)
    assert loss_of(model.train(), flat, labels=labels) == cut
    assert loss_of(model.eval(), flat, labels=labels) == whole
    assert cut != whole


def test_overlap_repeats_the_tail_of_the_segment_before(make_model):
    model, labels, flat = make_model(segment_size=8, input_size=11), random_ids(1, 4), random_ids(1, 16)
    by_hand = torch.ones(1, 2, 11, dtype=torch.long)
    by_hand[0, 0, :8], by_hand[0, 1] = flat[0, :8], flat[0, 5:]
    mask = torch.ones_like(by_hand)
    mask[0, 0, 8:] = 0
    torch.testing.assert_close(
        loss_of(model, flat, labels=labels), loss_of(model, by_hand, mask, labels=labels), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1] * 20, [0] * 20])}, "row 1 has no tokens"),
        ({"labels": torch.tensor([[5, 6], [-100, -100]])}, "row 1 has no target"),
        ({"labels": torch.tensor([[5, 6], [7, 60]])}, "row 1 holds 60 at position 1"),
        ({"labels": torch.tensor([[5, -2], [7, 8]])}, "row 0 holds -2"),
        ({"decoder_input_ids": torch.tensor([[2, 5], [5, 6]])}, "row 1 begins with 5"),
        ({"input_ids": random_ids(2, 2, 9)}, "segments have 9 tokens, but input_size is 8"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        (
            {"labels": random_ids(2, 5, 4)},
            r"target_segments have the shape \(2, 5\) .* the input has \(2, 3\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_inputs_are_refused_with_their_row(make_model, change, message):
    inputs = {"input_ids": random_ids(2, 20), "labels": torch.tensor([[5, 6], [7, 8]])}
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs | change)


@pytest.mark.parametrize("shape", [(2, 20), (2, 3, 8)], ids=["flat", "segments"])
@pytest.mark.parametrize(
    "read",
    [
        lambda model, *inputs: model(*inputs, labels=random_ids(2, 5)),
        lambda model, *inputs: model(*inputs, labels=random_ids(2, 3, 5)),
        lambda model, *inputs: model(*inputs, decoder_input_ids=random_ids(2, 5)),
        lambda model, *inputs: model.generate(inputs[0], attention_mask=inputs[1], max_new_tokens=2),
        lambda model, *inputs: model.model(*inputs, decoder_input_ids=random_ids(2, 5)),
        lambda model, *inputs: model.model.encode(*inputs, state=None),
        lambda model, *inputs: model.get_encoder()(*inputs),
    ],
    ids=["one target", "several targets", "decoder inputs", "generate", "base model", "encode", "encoder"],
)
def test_a_document_without_a_token_is_refused_unless_a_state_is_given(make_model, shape, read):
    ids = random_ids(*shape)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="attention_mask: row 1 has no tokens"):
        read(make_model(), ids, mask)


def test_a_batch_without_any_target_has_no_loss_and_touches_every_parameter(make_model, documents):
    """Check a rank without targets in a step in which other ranks have some."""
    model = make_model()
    loss = loss_of(model, documents, labels=torch.full((2, N_SEGMENTS, 4), -100))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def test_loss_is_divided_by_the_number_of_items_that_is_given(make_model, documents):
    model, labels = make_model(), random_ids(2, 4)
    mean = loss_of(model, documents, labels=labels)
    for n_items in (20, torch.tensor(20)):
        torch.testing.assert_close(
            loss_of(model, documents, labels=labels, num_items_in_batch=n_items), mean * 8 / 20, rtol=1e-12, atol=0
        )
