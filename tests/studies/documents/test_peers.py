"""Models to compare with are a BART's at first: full attention, numbered segments, LED."""

import pytest
import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.studies.documents.led import WholeDocumentLed
from recurrent_bart.studies.documents.peers import NumberedSegments, read_at_once, repeat_rows
from tiny import TINY, plain_model, random_ids, tiny_model

FUSION = {"pre_seq_len": 0, "decoder_context": "all", "segment_size": 8}


@pytest.fixture
def batch():
    mask = torch.ones(2, 3, 8, dtype=torch.long)
    mask[1, 1, 5:] = 0
    mask[1, 2] = 0
    return {"input_ids": random_ids(2, 3, 8), "attention_mask": mask, "labels": random_ids(2, 5)}


def test_rows_are_repeated_from_the_start():
    assert repeat_rows(torch.arange(3)[:, None], 7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_full_attention_reads_longer_documents_than_barts_positions():
    model = tiny_model(pre_seq_len=0, segment_size=8).double().eval()
    ids, labels = random_ids(1, 1, 60), random_ids(1, 5)
    expected = model(input_ids=ids[..., :8], labels=labels).logits
    read_at_once(model, 200)
    torch.testing.assert_close(model(input_ids=ids[..., :8], labels=labels).logits, expected)
    # positions 64 to 127 repeat positions 0 to 63: the same tokens there have the same embeddings
    positions = model.model.encoder.embed_positions(torch.zeros(1, 200)).squeeze()
    torch.testing.assert_close(positions[64:128], positions[:64])
    long = random_ids(1, 1, 150)
    other = long.clone()
    other[..., 149] = (long[..., 149] + 1) % 60
    logits = [model(input_ids=each, labels=labels).logits for each in (long, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_segment_numbers_begin_at_zero_and_tell_the_order(batch):
    model = tiny_model(**FUSION).double().eval()
    numbered = NumberedSegments(model, 3).double().eval()
    expected = model(**batch)
    found = numbered(**batch)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    # without numbers the order of the segments is not seen
    turned = {name: value.flip(1) if value.dim() == 3 else value for name, value in batch.items()}
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    turned_full = {**turned, "attention_mask": full["attention_mask"]}
    torch.testing.assert_close(numbered(**turned_full).logits, numbered(**full).logits)
    numbered.recurrence.weight.data.normal_()
    assert (numbered(**turned_full).logits - numbered(**full).logits).abs().max() > 1e-3


def test_segment_numbers_get_a_gradient_and_texts_use_them(batch):
    numbered = NumberedSegments(tiny_model(**FUSION).double().eval(), 3).double()
    numbered.recurrence.weight.data.normal_(std=3.0)
    numbered(**batch).loss.backward()
    assert (numbered.recurrence.weight.grad.abs().sum(1) > 0).all()
    ids = numbered.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6, min_new_tokens=6)
    with torch.no_grad():
        logits = numbered(
            batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=ids[:, :1]
        ).logits
    assert ids[:, 1].tolist() == logits[:, 0].argmax(-1).tolist()


def test_led_with_barts_weights_is_bart_on_a_document_of_one_window():
    bart = plain_model().double()
    bart.model.encoder.layers[0].self_attn.q_proj.weight.data.normal_()
    config = RecurrentBartConfig(**TINY, segment_size=8, decoder_start_token_id=2)
    led = WholeDocumentLed(config, n_tokens=160, window=64).double().eval()
    led.copy_weights(bart)
    ids, labels = random_ids(2, 20), random_ids(2, 5)
    expected = bart(input_ids=ids, labels=labels).logits
    found = led(ids[:, None], torch.ones(2, 1, 20, dtype=torch.long), labels).logits
    # LED's masks are float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_led_repeats_barts_positions():
    bart = plain_model()
    config = RecurrentBartConfig(**TINY, segment_size=8)
    led = WholeDocumentLed(config, n_tokens=160, window=64)
    led.copy_weights(bart)
    table = led.led.led.encoder.embed_positions.weight
    assert table.shape[0] == 192
    torch.testing.assert_close(table[64:128], bart.model.encoder.embed_positions.weight[2:])
    torch.testing.assert_close(table[:64], table[64:128])


def test_led_takes_barts_layers_alone_and_its_generation_settings():
    config = RecurrentBartConfig(**TINY, segment_size=8)
    led, bart = WholeDocumentLed(config, n_tokens=160, window=64), plain_model()
    bart.generation_config.num_beams = 3
    led.copy_weights(bart)
    assert led.generation_config.num_beams == 3
    assert led.generation_config is not bart.generation_config
    for changes in ({"normalize_before": True}, {"scale_embedding": True}):
        with pytest.raises(ValueError, match="LED has BART's layers"):
            led.copy_weights(tiny_model(**changes))
