"""LED takes our batches, returns our loss, and attends as LED does."""

import pytest
import torch

from recurrent_bart.configuration_recurrent_bart import RecurrentBartConfig
from recurrent_bart.studies.documents.led import WholeDocumentLed
from tiny import TINY, random_ids


@pytest.fixture
def led():
    config = RecurrentBartConfig(**TINY, segment_size=8, decoder_start_token_id=2)
    return WholeDocumentLed(config, n_tokens=40, window=8).double().eval()


@pytest.fixture
def batch():
    mask = torch.ones(2, 1, 40, dtype=torch.long)
    mask[1, 0, 25:] = 0
    labels = random_ids(2, 5)
    labels[0, 3:] = -100
    return {"input_ids": random_ids(2, 1, 40), "attention_mask": mask, "labels": labels}


def test_the_loss_is_summed_over_targets_and_divided_by_those_of_the_step(led, batch):
    output = led(**batch, num_items_in_batch=100)
    losses = torch.nn.functional.cross_entropy(output.logits.mT, batch["labels"], reduction="none")
    torch.testing.assert_close(output.loss, losses.sum() / 100)
    assert led(**batch, num_items_in_batch=100, return_logits=False).logits is None
    torch.testing.assert_close(led(**batch).loss, losses.sum() / 8)


def test_padding_changes_nothing_and_every_token_something(led, batch):
    logits = led(**batch).logits
    padded, last = (batch | {"input_ids": batch["input_ids"].clone()} for _ in range(2))
    padded["input_ids"][1, 0, 25:] = 7
    torch.testing.assert_close(led(**padded).logits, logits)
    last["input_ids"][1, 0, 24] = 7
    assert (led(**last).logits - logits)[1].abs().max() > 1e-6
    torch.testing.assert_close(led(**last).logits[0], logits[0])


def test_the_first_token_is_seen_beyond_the_window(led, batch):
    """Check the first layer, whose other tokens attend no further than the window."""
    inputs = led._document(batch["input_ids"], batch["attention_mask"])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 0] = 7
    first, other = (
        led.led.get_encoder()(**each, output_hidden_states=True).hidden_states[1] for each in (inputs, changed)
    )
    assert (first - other)[0, 39].abs().max() > 1e-9


def test_texts_are_generated(led, batch):
    ids = led.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4)
    assert ids.shape[0] == 2
    assert ids.shape[1] <= 5
    alone = led.generate(batch["input_ids"][1:, :, :25], batch["attention_mask"][1:, :, :25], max_new_tokens=4)
    assert alone[0].tolist() == ids[1, : alone.shape[1]].tolist()
