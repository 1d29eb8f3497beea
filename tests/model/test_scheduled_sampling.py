"""Tests of scheduled sampling: the oracles' tokens, their share of the inputs, and that nothing else changes.

Shape suffixes as in recurrent_bart/model/scheduled_sampling.py.
"""

import functools
import itertools
import math

import pytest
import torch

from recurrent_bart.model.scheduled_sampling import (
    Oracle,
    SpecialIds,
    caching,
    forced_length_beams,
    gold_probability,
    mix_inputs,
    nearest_text,
    ngram_f_score,
    noisy,
    target_lengths,
    word_oracle,
)
from tiny import random_ids, tiny_model

EOS, PAD = 2, 1
SPECIAL = SpecialIds(EOS, PAD, outside=(EOS, PAD))
KINDS = ("word", "sentence")
SHAPES = {"document": (3, 6), "sections": (3, 4, 6)}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2, "hidden_dropout_prob": 0.2}


def make_batch(shape):
    """Return documents and targets of different lengths; one segment has no target, and one does not exist."""
    torch.manual_seed(7)
    mask = torch.ones(3, 4, 8, dtype=torch.long)
    mask[1, 2:], mask[2, 1, 5:] = 0, 0
    labels = random_ids(*shape)
    if len(shape) == 3:
        labels[1, 2:], labels[0, 1] = -100, -100
    labels[0, ..., 4:], labels[2, ..., 3:] = -100, -100
    return {"input_ids": random_ids(3, 4, 8), "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, batch, oracle, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch, oracle=oracle).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def record_inputs(model):
    """Return a list that collects the decoder's input ids of each call, and if autograd is enabled."""
    calls = []

    def hook(module, args):
        calls.append((args[0], torch.is_grad_enabled()))

    model.model.decoder.embed_tokens.register_forward_pre_hook(hook)
    return calls


@pytest.mark.parametrize(
    ("epoch", "decay", "expected"),
    [(0, 1, 1 / 2), (0, 12, 12 / 13), (1, 1, 1 / (1 + math.e)), (10, 5, 5 / (5 + math.exp(2))), (1e9, 1, 0.0)],
)
def test_the_share_of_the_targets_words_decays_as_in_the_paper(epoch, decay, expected):
    assert gold_probability(epoch, decay) == pytest.approx(expected, rel=1e-12)


def test_the_share_of_the_targets_words_is_a_half_where_the_documentation_says():
    assert gold_probability(12 * math.log(12), 12) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_of_many_words_the_share_that_was_asked_for_stays(share):
    inputs, labels, words = torch.full((400, 251), 5), torch.full((400, 251), 6), torch.full((400, 251), 7)
    mixed = mix_inputs(inputs, words, labels, share)
    # 100,000 samples: five standard deviations are below 0.008
    assert (mixed[:, 1:] == 5).double().mean() == pytest.approx(share, abs=0.008 if 0 < share < 1 else 0)
    assert ((mixed == 5) | (mixed == 7)).all()
    # each token is sampled separately, not each row
    if 0 < share < 1:
        assert (mixed[:, 1:] == 5).any(dim=1).all()
        assert (mixed[:, 1:] == 7).any(dim=1).all()


def test_an_oracles_word_is_read_behind_its_position_and_never_where_there_is_no_target():
    inputs = torch.tensor([[2, 10, 11, 12, 13, 14]])
    words = torch.tensor([[20, 21, 22, 23, 24, 25]])
    labels = torch.tensor([[10, 11, -100, 13, 14, -100]])
    assert mix_inputs(inputs, words, labels, 0.0).tolist() == [[2, 20, 11, 12, 23, 14]]


def test_without_noise_the_word_oracle_is_the_best_word():
    logits = torch.randn(3, 5, 60)
    logits[..., [EOS, PAD]] = -1e4
    assert torch.equal(word_oracle(logits, 0.0, SPECIAL), logits.argmax(-1))
    assert not torch.equal(word_oracle(logits, 1.0, SPECIAL), logits.argmax(-1))


def test_the_word_oracle_never_ends_a_text_nor_pads_it():
    logits = torch.randn(20, 50, 6)
    logits[..., [EOS, PAD]] = 1e4
    for temperature in (0.0, 1.0, 1e3):
        assert not torch.isin(word_oracle(logits, temperature, SPECIAL), torch.tensor([EOS, PAD])).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_scales_the_noise_and_so_the_words_are_drawn_from_a_softmax(temperature):
    """Check the shares; dividing the noisy scores by the temperature would give the shares of temperature 1."""
    logits = torch.tensor([2.0, -50.0, -50.0, 0.5, 1.0])
    drawn = word_oracle(logits.expand(1, 100_000, -1), temperature, SPECIAL)
    shares = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    assert torch.allclose(shares, (logits / temperature).softmax(-1), atol=0.01)


def test_noise_is_added_in_float32_and_is_finite():
    found = noisy(torch.zeros(1_000_000, dtype=torch.bfloat16), 1.0)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    # mean of a Gumbel variable: Euler's constant
    assert found.mean() == pytest.approx(0.5772, abs=0.01)


def markov(table_VV):
    """Return a decoder step whose scores depend only on the last id."""

    def next_logits(ids_M, parents_M):
        return table_VV[ids_M]

    return next_logits


def test_beams_have_the_length_that_is_forced_on_them():
    table = torch.randn(9, 9)
    # the model prefers end and padding
    table[:, [EOS, PAD]] += 50
    lengths = torch.tensor([5, 1, 0, 3])
    texts = forced_length_beams(markov(table), torch.full((4,), EOS), lengths, 6, 3, 0.0, SPECIAL)
    assert texts.shape == (4, 3, 6)
    for row, length in zip(texts, lengths.tolist(), strict=True):
        for text in row.tolist():
            assert not {EOS, PAD} & set(text[: max(0, length - 1)])
            assert text[max(0, length - 1) :] == [EOS] * (length > 0) + [PAD] * (6 - length)


def test_beam_search_finds_what_a_search_through_all_texts_finds():
    """Use scores that depend on the last two ids, so that each step needs the right parent beam and row."""
    table, starts, words = torch.randn(7, 7, 7), (EOS, 0), [0, 3, 4, 5, 6]
    table[..., [EOS, PAD]] = -math.inf
    log_probs = table.log_softmax(-1)
    read = torch.full((2 * 5**3, 1), EOS)

    def next_logits(ids_M, parents_M):
        nonlocal read
        read = torch.cat([read[parents_M], ids_M.unsqueeze(1)], dim=1)
        return table[read[:, -2], read[:, -1]]

    def score(text):
        return float(sum(log_probs[triple] for triple in zip((EOS, *text), text, text[1:], strict=False)))

    lengths = torch.tensor([5, 5])
    texts = forced_length_beams(next_logits, torch.tensor(starts), lengths, 5, 5**3, 0.0, SPECIAL)
    for row, start in enumerate(starts):
        everything = ((start, *text) for text in itertools.product(words, repeat=4))
        best = sorted(everything, key=score, reverse=True)[:4]
        assert [(start, *text) for text in texts[row, :4, :-1].tolist()] == best


def test_beams_of_one_row_do_not_depend_on_the_others():
    table, start = torch.randn(9, 9), torch.full((3,), EOS)
    search = functools.partial(forced_length_beams, markov(table), n_beams=3, temperature=0.0, special=SPECIAL)
    together = search(start_B=start, lengths_B=torch.tensor([3, 6, 4]), n_steps=8)
    for row, length in enumerate((3, 6, 4)):
        alone = search(start_B=start[:1], lengths_B=torch.tensor([length]), n_steps=length)
        assert torch.equal(together[row, :, :length], alone[0])


@pytest.mark.parametrize("lengths", [[1, 1], [2, 6], [6, 6]])
def test_a_beam_search_makes_as_many_steps_as_it_is_told_to(lengths):
    n_calls = 0

    def next_logits(ids_M, parents_M):
        nonlocal n_calls
        n_calls += 1
        return torch.zeros(len(ids_M), 9)

    forced_length_beams(next_logits, torch.full((2,), EOS), torch.tensor(lengths), 9, 2, 0.0, SPECIAL)
    assert n_calls == 8


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8], 1.0),
        ([9, 9, 9, 9], [5, 6, 7, 8], 0.0),
        # unigrams 3 of 4, bigrams 2 of 3, trigrams 1 of 2
        ([5, 6, 7, 9], [5, 6, 7, 8], (3 / 4 + 2 / 3 + 1 / 2) / 4),
        # all unigrams, no bigram
        ([8, 7, 6, 5], [5, 6, 7, 8], 1 / 4),
        # a repeated id counts once, as in the target; one bigram of three matches
        ([5, 5, 5, 6], [5, 6, 7, 8], (2 / 4 + 1 / 3) / 4),
        ([5, 5, 5, 5], [5, 5, 7, 8], (2 / 4 + 1 / 3) / 4),
        # too short for trigrams
        ([5, 6], [5, 6], 2 / 4),
        # positions without a target are ignored and interrupt n-grams
        ([5, 6, 7, 8], [5, -100, 7, -100], 1 / 4),
        ([5, 6, 9, 9], [5, 6, -100, -100], 2 / 4),
        ([9, 9, 9, 9], [-100, -100, -100, -100], 0.0),
    ],
)
def test_how_near_a_text_is_to_the_target(text, label, expected):
    found = ngram_f_score(torch.tensor([[text]]), torch.tensor([label]))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_text_nearest_to_the_target_is_taken_and_of_equals_the_first():
    labels = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    texts = torch.tensor(
        [
            [[8, 7, 6, 5], [5, 6, 7, 9], [5, 6, 9, 9]],
            [[5, 5, 5, 6], [5, 5, 5, 9], [5, 5, 5, 5]],
        ]
    )
    assert nearest_text(texts, labels).tolist() == [[5, 6, 7, 9], [5, 5, 5, 6]]


def test_the_length_of_a_target_is_that_up_to_its_last_word():
    labels = torch.tensor([[5, 6, -100], [5, -100, 6], [-100, -100, -100]])
    assert target_lengths(labels).tolist() == [2, 3, 0]


@pytest.mark.each_value
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_but_the_targets_words_it_is_plain_training_to_the_bit(kind, shape):
    model, batch = tiny_model(**DROPOUT).train(), make_batch(shape)
    loss, gradients = loss_and_gradients(model, batch, None)
    next_draw = torch.rand(1)
    same_loss, same = loss_and_gradients(model, batch, Oracle(kind, 1.0))
    assert torch.equal(torch.rand(1), next_draw)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


@pytest.mark.each_value
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_that_of_the_last_decoder_pass_alone(kind, shape):
    """Compare loss and gradients with plain training on the same inputs."""
    model, batch = tiny_model().double().train(), make_batch(shape)
    calls = record_inputs(model)
    loss, gradients = loss_and_gradients(model, batch, Oracle(kind, 0.5))
    assert [graph for _, graph in calls] == [False] * (len(calls) - 1) + [True]
    mixed = calls[-1][0]
    plain = model.prepare_decoder_input_ids_from_labels

    # pass the same inputs in place of shifted labels
    model.prepare_decoder_input_ids_from_labels = lambda labels: mixed
    expected_loss, expected = loss_and_gradients(model, batch, None)
    model.prepare_decoder_input_ids_from_labels = plain
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    assert abs(loss - loss_and_gradients(model, batch, None)[0]) > 1e-3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("kind", "n_passes"), [("word", 2), ("sentence", 6)])
def test_the_encoder_is_run_once(kind, n_passes, shape):
    model, batch = tiny_model().train(), make_batch(shape)
    calls, n_encoder_calls = record_inputs(model), []
    model.model.encoder.register_forward_hook(lambda *_: n_encoder_calls.append(1))
    model(**batch, oracle=Oracle(kind, 0.5))
    # one pass for the word oracle; the beam search generates all 6 tokens but the end
    assert (len(n_encoder_calls), len(calls)) == (1, n_passes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_word_oracles_words_are_those_the_model_predicts(shape):
    model, batch = tiny_model().eval(), make_batch(shape)
    calls = record_inputs(model)
    model(**batch, oracle=Oracle("word", 0.0, temperature=0.0))
    (plain, _), (mixed, _) = calls
    logits = model(**batch).logits
    labels = batch["labels"].view(-1, 6)
    has_target = (labels != -100).any(-1)
    logits[..., [1, 2]] = -math.inf
    best, labels = logits.view(-1, *logits.shape[-2:])[has_target].argmax(-1), labels[has_target]
    is_target = labels != -100
    expected = torch.where(is_target[:, 1:] & is_target[:, :-1], best[:, :-1], plain[:, 1:])
    assert torch.equal(mixed[:, 1:], expected)
    assert not torch.equal(mixed, plain)
    assert (mixed[:, 0] == model.config.decoder_start_token_id).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_before_a_language_code_is_never_replaced(kind):
    """MBart's targets end with `</s>` and a language code, so the decoder reads the end token in training."""
    model, batch = tiny_model(wraps_last_label=True, decoder_start_token_id=None).eval(), make_batch((3, 6))
    batch["labels"] = random_ids(3, 6)
    batch["labels"][:, 4], batch["labels"][:, 5] = EOS, 58
    calls = record_inputs(model)
    model(**batch, oracle=Oracle(kind, 0.0))
    mixed = calls[-1][0]
    assert mixed[:, 5].tolist() == [EOS] * 3
    assert mixed[:, 0].tolist() == [58] * 3
    assert not torch.equal(mixed[:, 1:5], batch["labels"][:, :4])


def test_a_sentence_oracle_of_one_beam_writes_what_greedy_generation_writes():
    """Forbid end and padding in `generate` too; cache, order and state must then be the same."""
    model, batch = tiny_model().double().eval(), make_batch((3, 6))
    batch["labels"] = random_ids(3, 6)
    calls = record_inputs(model)
    model(**batch, oracle=Oracle("sentence", 0.0, temperature=0.0, n_beams=1))
    documents = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # min_new_tokens forbids eos until the last step, where it is forced
    written = model.generate(**documents, max_new_tokens=6, min_new_tokens=6, num_beams=1, suppress_tokens=[1])
    assert torch.equal(calls[5][0], written[:, :6])


@pytest.mark.parametrize("fields", [{}, {"prefix_attention": "concat"}, {"decoder_context": "memory"}])
def test_a_sentence_oracles_cache_gives_what_reading_all_again_gives(fields):
    model, batch = tiny_model(**fields).double().eval(), make_batch((3, 6))
    encoded = model.model.encode(batch["input_ids"], batch["attention_mask"])
    n_beams = 3
    whole = encoded.rows(torch.arange(3).repeat_interleave(n_beams))
    texts = torch.full((3 * n_beams, 1), EOS)
    with torch.no_grad():
        step = model._next_logits(encoded, n_beams)
        parents = torch.arange(3 * n_beams)
        for _ in range(5):
            texts = texts[parents]
            found = step(texts[:, -1], parents)
            expected = model._logits(model.model.decode(whole, input_ids=texts).last_hidden_state)[:, -1]
            assert torch.allclose(found, expected, atol=1e-10)
            texts = torch.cat([texts, random_ids(3 * n_beams, 1)], dim=1)
            parents = (torch.randint(n_beams, (3, n_beams)) + n_beams * torch.arange(3).unsqueeze(1)).flatten()


@pytest.mark.each_value
@pytest.mark.parametrize("grain", ["layer", "segment"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind, grain):
    """Check that the cache survives: checkpointing silently drops it in training, and each step would see one token."""
    model, batch = tiny_model(**DROPOUT).double().train(), make_batch((3, 6))
    loss, gradients = loss_and_gradients(model, batch, Oracle(kind, 0.3))
    model.set_gradient_checkpointing(grain)
    same_loss, same = loss_and_gradients(model, batch, Oracle(kind, 0.3))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    assert all(layer.gradient_checkpointing for layer in model.model.decoder.layers)


def test_a_decoder_is_as_it_was_after_an_error_in_the_search():
    decoder = tiny_model(decoder_layerdrop=0.5).train().model.decoder
    decoder.layers[0].gradient_checkpointing = True

    def search():
        with caching(decoder):
            assert decoder.layerdrop == 0
            assert not decoder.layers[0].gradient_checkpointing
            raise KeyError

    with pytest.raises(KeyError):
        search()
    assert decoder.layerdrop == 0.5
    assert [layer.gradient_checkpointing for layer in decoder.layers] == [True, False]


@pytest.mark.each_value
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_what_is_read(kind, shape):
    model, batch = tiny_model(**DROPOUT).train(), make_batch(shape)
    calls = record_inputs(model)

    def read(seed):
        calls.clear()
        loss_and_gradients(model, batch, Oracle(kind, 0.5), seed)
        return calls[-1][0]

    first, again, other = read(1), read(1), read(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_decoder_reads_holds_no_pad_and_no_end(kind, shape):
    model, batch = tiny_model().train(), make_batch(shape)
    # the model prefers padding and end
    model.final_logits_bias[:, [1, 2]] = 100.0
    calls = record_inputs(model)
    model(**batch, oracle=Oracle(kind, 0.0))
    labels = batch["labels"].view(-1, 6)
    is_target = labels[(labels != -100).any(-1)][:, 1:] != -100
    assert not torch.isin(calls[-1][0][:, 1:][is_target], torch.tensor([1, 2])).any()


def test_more_steps_than_the_target_has_words_change_nothing():
    model, batch = tiny_model().double().eval(), make_batch((3, 6))
    loss = model(**batch, oracle=Oracle("sentence", 0.0, temperature=0.0)).loss
    calls = record_inputs(model)
    assert torch.equal(model(**batch, oracle=Oracle("sentence", 0.0, temperature=0.0, n_steps=11)).loss, loss)
    assert len(calls) == 11


@pytest.mark.parametrize("kind", KINDS)
def test_segments_without_any_target_make_as_many_passes(kind):
    model, batch = tiny_model().train(), make_batch((3, 4, 6))
    batch["labels"] = torch.full((3, 4, 1), -100)
    calls = record_inputs(model)
    loss, _ = loss_and_gradients(model, batch, Oracle(kind, 0.5, n_steps=6))
    assert loss == 0
    assert len(calls) == (2 if kind == "word" else 6)


@pytest.mark.parametrize("extra", ["decoder_attention_mask", "decoder_inputs_embeds"])
def test_an_oracle_needs_labels_and_plain_decoder_inputs(extra):
    model, batch = tiny_model(), make_batch((3, 6))
    with pytest.raises(ValueError, match="oracle: needs labels, and neither"):
        model(**batch, **{extra: torch.ones(3, 6, 16)}, oracle=Oracle("word", 0.5))
    with pytest.raises(ValueError, match="oracle: needs labels, and neither"):
        model(input_ids=random_ids(1, 8), oracle=Oracle("word", 0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "none"}, "oracle 'none': allowed are word, sentence"),
        ({"gold_probability": 1.5}, "gold_probability=1.5: must be from 0 to 1"),
        ({"gold_probability": math.nan}, "gold_probability=nan"),
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"n_beams": 0}, "n_beams=0: must be at least 1"),
    ],
)
def test_an_oracle_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Oracle(**{"kind": "word", "gold_probability": 0.5} | fields)
