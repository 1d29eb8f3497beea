"""Tests of the decoder's context: equality with a naive reference, and positions that must stay hidden."""

import pytest
import torch

from recurrent_bart import RecurrentBartConfig
from recurrent_bart.model import decoder_context
from recurrent_bart.model.scheduled_sampling import Oracle
from recurrent_bart.recurrence.prefix_recurrence import RecurrentState
from recurrent_bart.recurrence.segmentation import pad_segments
from reference import context, encode
from tiny import batch_of, random_ids

RAGGED = [[8, 8, 3], [5], [8, 2]]
CONTEXTS = {
    "memory": {"decoder_context": "memory"},
    "all": {"decoder_context": "all"},
    "memory of top": {"decoder_context": "memory", "recurrence": "top"},
    "all without state": {"decoder_context": "all", "recurrence": "none"},
    "all without recurrence": {"decoder_context": "all", "pre_seq_len": 0},
    "section": {"decoder_context": "section"},
    "two of memory": {"decoder_context": "memory", "context_segments": 2},
    "two of a section": {"decoder_context": "section", "context_segments": 2},
    "two of all": {"decoder_context": "all", "context_segments": 2},
    "one of all": {"decoder_context": "all", "context_segments": 1},
    "section without state": {"decoder_context": "section", "recurrence": "none"},
    "all in one softmax": {"decoder_context": "all", "prefix_attention": "concat"},
}
of_every_context = pytest.mark.parametrize("fields", CONTEXTS.values(), ids=CONTEXTS)


@of_every_context
def test_reference_values_and_gradients(make_model, fields):
    model = make_model(**fields)
    documents, input_ids, mask = batch_of(RAGGED)
    output = model.model.encoder(input_ids, attention_mask=mask)
    expected = [context(model.config, encode(model, document)[0], len(document) - 1) for document in documents]
    for row, rows in enumerate(expected):
        seen = output.context_mask[row].bool()
        torch.testing.assert_close(output.last_hidden_state[row, seen], rows, rtol=0, atol=1e-10)
    output.last_hidden_state[output.context_mask.bool()].sin().sum().backward()
    got = {name: p.grad.clone() for name, p in model.model.encoder.named_parameters()}
    model.zero_grad()
    sum(rows.sin().sum() for rows in expected).backward()
    for name, parameter in model.model.encoder.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.each_value
@of_every_context
def test_reference_after_every_segment(make_model, fields):
    model = make_model(**fields)
    documents, input_ids, mask = batch_of(RAGGED)
    output = model.model.encoder(input_ids, attention_mask=mask, decode_at="every_segment")
    for row, document in enumerate(documents):
        after, _ = encode(model, document)
        for t in range(len(document)):
            seen = output.context_mask[row, t].bool()
            expected = context(model.config, after, t, ends=range(len(document)))
            torch.testing.assert_close(output.last_hidden_state[row, t, seen], expected, rtol=0, atol=1e-10)


SECTIONS = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
SIZES = [[8, 8, 3, 8, 2], [5, 8, 8], [8, 2, 8, 4, 1], [8, 7]]


def of_sections():
    """Return documents whose sections end at different segments, with labels at the ends."""
    documents, input_ids, mask = batch_of(SIZES)
    labels = random_ids(4, 5, 6).masked_fill(~SECTIONS.unsqueeze(-1), -100)
    return documents, {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("fields", "n_most"),
    [(CONTEXTS["section"], 4), (CONTEXTS["section without state"], 4), (CONTEXTS["two of a section"], 2)],
    ids=["state", "none", "two"],
)
def test_the_decoder_sees_the_tokens_of_the_section_that_a_target_is_of(make_model, fields, n_most):
    model, (documents, inputs) = make_model(**fields), of_sections()
    output = model.model.encode(inputs["input_ids"], inputs["attention_mask"], target_segments=SECTIONS)
    for number, (row, t) in enumerate(SECTIONS.nonzero().tolist()):
        after, _ = encode(model, documents[row])
        expected = context(model.config, after, t, ends=SECTIONS[row].nonzero().flatten().tolist())
        seen = output.context_mask[number].bool()
        torch.testing.assert_close(output.last_hidden_state[number, seen], expected, rtol=0, atol=1e-10)
    # the context is as long as the longest section, not longer
    assert output.last_hidden_state.shape[:2] == (SECTIONS.sum(), (output.n_memory or 0) + n_most * 8)


def test_a_section_is_trained_and_told_as_it_is_from_its_own_context(make_model):
    """Compare logits and generated ids with a document that begins at the section, with the state before it."""
    model, (_, inputs) = make_model(decoder_context="section").double(), of_sections()
    output = model(**inputs)
    logits = output.logits
    # rows belong to targets, not to documents
    assert output.encoder_last_hidden_state is None
    told = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], target_segments=SECTIONS,
                          max_new_tokens=6)  # fmt: skip
    for row, t in SECTIONS.nonzero().tolist():
        ids, mask = (inputs[name][row : row + 1] for name in ("input_ids", "attention_mask"))
        first = max((end + 1 for end in SECTIONS[row].nonzero().flatten().tolist() if end < t), default=0)
        part = slice(first, t + 1)
        state = None
        if first:
            read = model.model.encode(ids[:, :first], mask[:, :first])
            state = RecurrentState(read.state.position, read.state.memory)
        own = {"input_ids": ids[:, part], "attention_mask": mask[:, part], "state": state}
        alone = model(**own, labels=inputs["labels"][row, t].unsqueeze(0)).logits
        torch.testing.assert_close(logits[row, t], alone[0], rtol=0, atol=1e-12)
        single = model.generate(**own, max_new_tokens=6)[0]
        assert torch.equal(told[row, t, : len(single)], single)


@pytest.mark.each_value
@pytest.mark.parametrize("most", [-1, 2])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_section_goes_on_in_the_next_window(make_model, cut, most):
    """Check also windows without a target, and that the state carries no finished section."""
    model = make_model(decoder_context="section", context_segments=most).double()
    _, inputs = of_sections()
    ids, mask, labels = (inputs[name][[0, 2]] for name in ("input_ids", "attention_mask", "labels"))
    whole = model(input_ids=ids, attention_mask=mask, labels=labels)
    first = model(input_ids=ids[:, :cut], attention_mask=mask[:, :cut], labels=labels[:, :cut])
    rest = {"input_ids": ids[:, cut:], "attention_mask": mask[:, cut:], "labels": labels[:, cut:]}
    second = model(**rest, state=first.state)
    is_first = (labels[:, :cut] != -100).any(-1)
    torch.testing.assert_close(
        torch.cat([first.logits * is_first[..., None, None], second.logits], dim=1), whole.logits, rtol=0, atol=1e-12
    )
    for row in range(2):
        begin = max((end + 1 for end in is_first[row].nonzero().flatten().tolist()), default=0)
        begin = begin if most == -1 else max(begin, cut + 1 - most)
        assert (first.state.context_number[row] > 0).sum() == mask[row, begin:cut].sum()


def test_a_state_of_sections_stays_as_small_as_they_are(make_model):
    model, ids = make_model(decoder_context="section"), random_ids(1, 9, 8)
    ends = torch.zeros(1, 9, dtype=torch.bool)
    ends[0, [3, 6]] = True
    assert model.model.encode(ids, target_segments=ends).state.context.shape == (1, 2 * 8, 16)
    ends[0, 8] = True
    ended = model.model.encode(ids, target_segments=ends).state
    # the section that has ended, which the decoder sees until the document goes on
    assert ended.context.shape == (1, 2 * 8, 16)
    assert ended.context_number.tolist() == [[-8] * 8 + [-9] * 8]
    assert model.model.encode(ids[:, :1], state=ended).state.context_number.tolist() == [[10] * 8]
    # without a target segment no section ends
    assert model.model.encode(ids).state.context.shape == (1, 9 * 8, 16)


@pytest.mark.parametrize("name", ["memory", "all"])
def test_a_state_of_the_last_segments_does_not_grow(make_model, name):
    model, state, ids = make_model(decoder_context=name, context_segments=3), None, random_ids(2, 9, 8)
    for t in range(9):
        state = model.model.encode(ids[:, t : t + 1], state=state).state
        n_positions = 3 if name == "memory" else 8
        assert state.context.shape == (2, min(3, t + 1) * n_positions, 16)
        # the oldest of three segments leaves the context when another one is read
        oldest = [-t + 1] * n_positions if t > 1 else []
        assert state.context_number[0].tolist() == oldest + [n for n in (t, t + 1) if n for _ in range(n_positions)]


@pytest.mark.parametrize("fields", [{}, CONTEXTS["memory"], CONTEXTS["two of all"]], ids=["last", "memory", "all"])
def test_rows_of_marked_segments_are_what_stands_after_every_one(make_model, fields):
    """Check also marked segments without text, and no marked segment, which gives one row."""
    model, marked = make_model(**fields), torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 1]]).bool()
    _, ids, mask = batch_of(RAGGED)
    whole = model.model.encode(ids, mask, decode_at="every_segment")
    rows = model.model.encode(ids, mask, target_segments=marked)
    assert torch.equal(rows.is_read, whole.is_read)
    is_read = whole.is_read[marked]
    assert is_read.tolist() == [True, True, True, False, True, False]
    for number, (row, t) in enumerate(marked.nonzero().tolist()):
        if is_read[number]:
            pairs = (
                (it.last_hidden_state[at], it.context_mask[at].bool()) for it, at in ((rows, number), (whole, (row, t)))
            )
            found, expected = (hidden[seen] for hidden, seen in pairs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(model.model.encode(ids, mask, target_segments=torch.zeros(3, 3).bool()).last_hidden_state) == 1


PACKED = {
    "section": {"decoder_context": "section"},
    "gated": {"decoder_context": "section", "prefix_attention": "gated"},
    "concat": {"decoder_context": "section", "prefix_attention": "concat"},
    "all": {"decoder_context": "all"},
    "five of all": {"decoder_context": "all", "context_segments": 5},
    "without state": {"decoder_context": "section", "recurrence": "none"},
    "windows": {"decoder_context": "section", "bptt_depth": 1},
}


@pytest.mark.each_value
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", PACKED.values(), ids=PACKED)
def test_packed_contexts_give_the_numbers_and_gradients_of_rows(make_model, monkeypatch, fields, back_end):
    """Check also sections that began before the state, followed by more targets in some documents only."""
    model, (_, inputs) = make_model(**fields).double(), of_sections()
    model.set_attn_implementation(back_end)
    model.gradient_checkpointing_enable()
    model.train()
    state = model.model.encode(random_ids(4, 2, 8)).state.detach()
    found, n_packed, pack = [], [], decoder_context._pack
    monkeypatch.setattr(decoder_context, "_pack", lambda *parts: n_packed.append(len(found)) or pack(*parts))
    for saving in (0, 100):
        monkeypatch.setattr(decoder_context, "LEAST_SAVING", saving)
        model.zero_grad()
        output = model(**inputs, state=state)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters())])
    assert n_packed == [0]
    for packed, row in zip(*found, strict=True):
        torch.testing.assert_close(packed, row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["word", "sentence"])
def test_an_oracle_takes_rows(make_model, monkeypatch, kind):
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    monkeypatch.setattr(decoder_context, "_pack", None)
    model, (_, inputs) = make_model(decoder_context="section").train(), of_sections()
    assert model(**inputs, oracle=Oracle(kind, gold_probability=0.5, n_steps=6)).loss.isfinite()


def test_contexts_are_padded_to_at_most_four_times_their_segments(make_model):
    model, ids = make_model(decoder_context="section"), random_ids(1, 16, 8)
    ends = torch.zeros(1, 16, dtype=torch.bool)
    # sections of 1, 1, 1, 2, 3, 8 segments
    ends[0, [0, 1, 2, 4, 7, 15]] = True
    packed = model.model.encode(ids, target_segments=ends, may_pack=True)
    n_slots = packed.n_memory
    sizes = [(3, n_slots + 8), (2, n_slots + 24), (1, n_slots + 64)]
    assert packed.packing.sizes == sizes
    assert packed.packing.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.last_hidden_state.shape == (1, sum(rows * positions for rows, positions in sizes), 16)
    rows = model.model.encode(ids, target_segments=ends)
    assert rows.packing is None
    assert rows.last_hidden_state.shape == (6, n_slots + 64, 16)


def test_contexts_that_are_about_as_long_are_not_packed(make_model, monkeypatch):
    """Check that contexts of which half is padding stay rows."""
    model, ids = make_model(decoder_context="section"), random_ids(2, 4, 8)
    ends = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert model.model.encode(ids, target_segments=ends, may_pack=True).packing is None
    # contexts of states are short and never packed
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    assert model.model.encode(ids, target_segments=ends, may_pack=True).packing is not None
    model = make_model(decoder_context="memory")
    assert model.model.encode(ids, target_segments=ends, may_pack=True).packing is None


def test_packed_contexts_are_in_the_order_of_marks_also_of_segments_without_text(make_model, monkeypatch):
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    model = make_model(decoder_context="section")
    marked = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 1]]).bool()
    _, ids, mask = batch_of(RAGGED)
    rows = model.model.encode(ids, mask, target_segments=marked)
    packed = model.model.encode(ids, mask, target_segments=marked, may_pack=True)
    hidden, seen = (packed.packing.unpack(part, 1) for part in (packed.last_hidden_state, packed.context_mask))
    found = [
        part[is_seen.bool()]
        for group, mask in zip(hidden, seen, strict=True)
        for part, is_seen in zip(group[0], mask[0], strict=True)
    ]
    is_read = rows.is_read[marked]
    assert len(found) == 6
    for part, number in zip(found, packed.packing.order.tolist(), strict=True):
        if is_read[number]:
            expected = rows.last_hidden_state[number, rows.context_mask[number].bool()]
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-12)


def test_marks_of_other_segments_are_refused(make_model):
    with pytest.raises(ValueError, match=r"target_segments have the shape \(1, 2\) .*, but the input has \(1, 3\)"):
        make_model().model.encode(random_ids(1, 3, 8), target_segments=torch.ones(1, 2).bool())


@pytest.mark.each_value
@of_every_context
def test_ragged_documents_are_decoded_as_alone(make_model, fields):
    model, labels = make_model(**fields), random_ids(3, 4)
    documents, input_ids, mask = batch_of(RAGGED)
    logits = model(input_ids=input_ids, attention_mask=mask, labels=labels).logits
    for row, document in enumerate(documents):
        _, own_ids, own_mask = batch_of([[len(segment) for segment in document]])
        own_ids = pad_segments([document], padding=1)
        alone = model(input_ids=own_ids, attention_mask=own_mask, labels=labels[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.each_value
@of_every_context
def test_a_state_continues_to_the_same_numbers(make_model, fields):
    """Check that the state carries the context of earlier segments."""
    model, ids, labels = make_model(**fields), random_ids(2, 5, 8), random_ids(2, 4)
    mask = torch.ones_like(ids)
    mask[1, 4] = 0
    whole = model(input_ids=ids, attention_mask=mask, labels=labels)
    first = model.model.encoder(ids[:, :2]).state.detach()
    second = model(input_ids=ids[:, 2:], attention_mask=mask[:, 2:], labels=labels, state=first)
    torch.testing.assert_close(second.logits, whole.logits, rtol=0, atol=1e-12)
    how = {"num_beams": 2, "max_new_tokens": 6}
    assert torch.equal(
        model.generate(ids[:, 2:], attention_mask=mask[:, 2:], state=first, **how),
        model.generate(ids, attention_mask=mask, **how),
    )


@pytest.mark.each_value
@pytest.mark.parametrize("depth", [0, 1, 2, -1])
@pytest.mark.parametrize("fields", [CONTEXTS["memory"], CONTEXTS["all"]], ids=["memory", "all"])
def test_bptt_gradient_through_the_context_reaches_as_far_as_through_the_state(make_model, fields, depth):
    n_segments = 7
    model = make_model(bptt_depth=depth, **fields)
    embeds = model.model.shared(random_ids(2, n_segments, 8)).detach().requires_grad_()
    output = model.model.encoder(inputs_embeds=embeds, decode_at="every_segment")
    window = n_segments if depth == -1 else depth + 1
    from_end = [(n_segments - 1 - s) // window for s in range(n_segments)]
    for t in range(n_segments):
        seen = output.last_hidden_state[:, t][output.context_mask[:, t].bool()]
        (gradient,) = torch.autograd.grad(seen.sin().sum(), embeds, retain_graph=True)
        reached = gradient.abs().amax(dim=(0, 2, 3)) > 0
        assert reached.tolist() == [s <= t and from_end[s] == from_end[t] for s in range(n_segments)]


@pytest.mark.parametrize("context_name", ["last", "memory", "section", "all"])
def test_a_batch_with_nothing_to_read_is_finite_and_touches_every_parameter(make_model, context_name):
    """Check a rank that has no text in a BPTT window in which other ranks have some."""
    model = make_model(decoder_context=context_name)
    ids = torch.ones(2, 1, 1, dtype=torch.long)
    output = model(
        input_ids=ids,
        attention_mask=torch.zeros_like(ids),
        labels=torch.full((2, 1, 1), -100),
        state=RecurrentState.unread(model.config, 2),
    )
    output.loss.backward()
    assert output.loss == 0
    assert output.state.position.tolist() == [0, 0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_memory_without_a_state_is_refused():
    for fields in ({"recurrence": "none"}, {"pre_seq_len": 0}):
        with pytest.raises(ValueError, match='decoder_context="memory" needs a state'):
            RecurrentBartConfig(decoder_context="memory", **fields)


def test_a_segment_that_a_document_does_not_have_ends_no_section(make_model):
    """Mark a segment that, once documents are aligned at the end, lies before the document's first."""
    model = make_model(decoder_context="section")
    state = model.model.encode(random_ids(2, 2, 8)).state
    mask = torch.ones(2, 4, 8, dtype=torch.long)
    mask[1, 1:] = 0
    documents = {"input_ids": random_ids(2, 4, 8), "attention_mask": mask, "state": state}
    marked = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    expected = model.model.encode(**documents, target_segments=marked)
    marked[1, 2] = True
    found = model.model.encode(**documents, target_segments=marked)
    torch.testing.assert_close(found.rows(torch.tensor([0, 1])).last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.rows(torch.tensor([0, 1])).context_mask, expected.context_mask)
    # two segments from the state and one of this call
    assert expected.context_mask[1].sum() == expected.n_memory + 3 * 8


GAPS = [{}, {"context_segments": 2}, {"recurrence": "none"}]
GAPS += [{"decoder_context": "memory"}, {"decoder_context": "section"}]


@pytest.mark.each_value
@pytest.mark.parametrize("task", ["document", "sections"])
@pytest.mark.parametrize("fields", GAPS, ids=str)
def test_an_empty_segment_inside_a_document_changes_nothing(make_model, fields, task):
    """Compare values and gradients without and with the empty segment; the first and the last segment have targets."""
    model = make_model(**{"decoder_context": "all", "bptt_depth": -1} | fields)
    ids, labels = random_ids(1, 3, 8), random_ids(1, 3, 4)
    labels[:, 1] = -100
    gap, mask = [0, 0, 1, 2], torch.ones(1, 4, 8, dtype=torch.long)
    mask[0, 1] = 0
    found = []
    for inputs, order in (({"input_ids": ids}, [0, 1, 2]), ({"input_ids": ids[:, gap], "attention_mask": mask}, gap)):
        targets = labels[:, order].clone()
        if len(order) > 3:
            targets[:, 1] = -100
        model.zero_grad()
        loss = model(**inputs, labels=targets[:, -1] if task == "document" else targets).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, with_gap in zip(*found, strict=True):
        torch.testing.assert_close(with_gap, expected, rtol=0, atol=1e-12)


def test_the_gradient_reaches_the_last_segments_that_a_document_has(make_model):
    model = make_model(decoder_context="all", context_segments=2, bptt_depth=0)
    embeds = model.model.encoder.embed_tokens(random_ids(1, 4, 8)).detach().requires_grad_()
    mask = torch.ones(1, 4, 8, dtype=torch.long)
    mask[0, 2] = 0
    model(inputs_embeds=embeds, attention_mask=mask, labels=random_ids(1, 4)).loss.backward()
    assert (embeds.grad.abs().amax(dim=(0, 2, 3)) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("target_segments", "message"),
    [
        (torch.tensor([[1, 0, 1]]), "a tensor of booleans .* but it has torch.int64"),
        ([[True, False, True]], "a tensor of booleans .* but it has list"),
        (torch.tensor([True, False, True]), "a tensor of booleans"),
        (torch.tensor([[True, False, True]]), "each document needs exactly one True"),
        (torch.tensor([[False, False, False]]), "each document needs exactly one True"),
    ],
    ids=["integers", "list", "one dimension", "two", "none"],
)
def test_a_forward_pass_refuses_target_segments_that_it_cannot_decode(make_model, target_segments, message):
    inputs = {"input_ids": random_ids(1, 3, 8), "labels": random_ids(1, 4)}
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs, target_segments=target_segments)


def test_labels_of_segments_leave_no_place_to_decode_at(make_model):
    inputs = {"input_ids": random_ids(1, 3, 8), "labels": random_ids(1, 3, 4)}
    with pytest.raises(ValueError, match="target_segments: not used with labels"):
        make_model()(**inputs, target_segments=torch.ones(1, 3).bool())


def test_a_state_of_another_type_is_refused(make_model):
    with pytest.raises(ValueError, match="state: a RecurrentState is needed, but a Tensor was given"):
        make_model().model.encode(random_ids(1, 3, 8), state=torch.zeros(1, 3, 16))


def test_packed_contexts_of_other_segments_are_refused(make_model, monkeypatch):
    monkeypatch.setattr(decoder_context, "LEAST_SAVING", 0)
    model = make_model(decoder_context="section")
    target_segments = torch.tensor([[True, False, False, False, True]])
    packed = model.model.encode(random_ids(1, 5, 8), target_segments=target_segments, may_pack=True)
    assert packed.packing is not None
    with pytest.raises(ValueError, match="encoder_outputs of shape"):
        model.generate(encoder_outputs=packed, target_segments=torch.ones(1, 5).bool(), max_new_tokens=3)


def test_an_unknown_place_is_refused_with_encoder_outputs_too(make_model):
    model = make_model()
    encoded = model.model.encode(random_ids(1, 3, 8))
    with pytest.raises(ValueError, match="decode_at='end': allowed are"):
        model.generate(encoder_outputs=encoded, decode_at="end", max_new_tokens=3)
