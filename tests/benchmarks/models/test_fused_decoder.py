"""SegEnc and BART with full attention are Hugging Face's BART."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from recurrent_bart.benchmarks.models.fused_decoder import decoder_loss, encode_segments
from tiny import TINY, random_ids


@pytest.fixture(scope="module")
def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**TINY)).double().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_barts_own(bart, attention):
    bart.set_attn_implementation(attention)
    ids, labels = random_ids(2, 1, 8), random_ids(2, 5)
    found = decoder_loss(bart, encode_segments(bart, ids), labels)
    torch.testing.assert_close(found, bart(ids[:, 0], labels=labels).loss, rtol=1e-12, atol=0)


def test_segments_are_encoded_alone_and_decoded_together(bart):
    ids, labels = random_ids(2, 3, 8), random_ids(2, 5)
    read = [bart.get_encoder()(segment).last_hidden_state for segment in ids.unbind(1)]
    fused = torch.cat(read, dim=1)
    torch.testing.assert_close(encode_segments(bart, ids), fused, rtol=0, atol=1e-12)
    expected = bart(encoder_outputs=BaseModelOutput(last_hidden_state=fused), labels=labels).loss
    torch.testing.assert_close(decoder_loss(bart, fused, labels), expected, rtol=1e-12, atol=0)
