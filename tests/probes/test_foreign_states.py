"""The states of other documents change what segments after the first read, and nothing else."""

import pytest
import torch

from recurrent_bart.probes.foreign_states import encode_with_foreign_states
from tiny import random_ids, tiny_model

SETTINGS = {"decoder_context": "all", "segment_size": 8}


def test_equal_documents_lend_each_other_their_own_states():
    model, ids = tiny_model(**SETTINGS).double().eval(), random_ids(1, 3, 8).expand(4, 3, 8)
    labels = random_ids(4, 5)
    expected = model(input_ids=ids, labels=labels).logits
    encoded = encode_with_foreign_states(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(model(encoder_outputs=encoded, labels=labels).logits, expected)


def test_the_state_of_the_document_before_is_read():
    model, ids = tiny_model(**SETTINGS).double().eval(), random_ids(3, 2, 8)
    encoded = encode_with_foreign_states(model, ids, torch.ones_like(ids))
    # read by hand: the second segment of document 0 after the first segment of document 2
    mixed = torch.stack([ids[2, 0], ids[0, 1]])[None]
    with torch.no_grad():
        by_hand = model.model.encode(mixed).last_hidden_state[:, -8:]
        own = model.model.encode(ids[:1]).last_hidden_state
    found = encoded.last_hidden_state[:1]
    torch.testing.assert_close(found[:, -8:], by_hand)
    # the first segment's tokens, between the state's positions and the second segment, are the document's own
    torch.testing.assert_close(found[:, -16:-8], own[:, -16:-8])
    assert (found[:, -8:] - own[:, -8:]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("changes", "n_documents", "message"),
    [
        ({}, 1, "1 documents of 2 segments"),
        ({"recurrence": "none"}, 2, "carries no state"),
        ({"pre_seq_len": 0}, 2, "no state"),
    ],
)
def test_what_has_no_foreign_state_is_refused(changes, n_documents, message):
    ids = random_ids(n_documents, 2, 8)
    with pytest.raises(ValueError, match=message):
        encode_with_foreign_states(tiny_model(**SETTINGS | changes).eval(), ids, torch.ones_like(ids))
