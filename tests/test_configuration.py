"""Tests of the values that the configuration accepts, derives and refuses."""

import pytest
from transformers import AutoConfig, BartConfig, MBartConfig

from recurrent_bart import RecurrentBartConfig


@pytest.mark.parametrize(
    ("fields", "segment_size", "input_size"),
    [
        ({}, 512, 512),
        ({"max_position_embeddings": 128}, 128, 128),
        ({"segment_size": 100}, 100, 100),
        ({"segment_size": 100, "input_size": 120}, 100, 120),
        ({"input_size": 300}, 300, 300),
    ],
)
def test_sizes_follow_from_each_other(fields, segment_size, input_size):
    config = RecurrentBartConfig(**fields)
    assert (config.segment_size, config.input_size) == (segment_size, input_size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_size": 2000}, "segment_size=2000, .* must be at most max_position_embeddings=1024"),
        ({"segment_size": 10, "input_size": 8}, "input_size=8: must be at least segment_size=10"),
        ({"segment_size": 2}, "segment_size=2: must be at least 3"),
        ({"pre_seq_len": -1}, "pre_seq_len=-1"),
        ({"bptt_depth": -2}, "bptt_depth=-2"),
        ({"max_n_segments": 0}, "max_n_segments=0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0"),
        ({"prefix_hidden_size": 0}, "prefix_hidden_size=0"),
        ({"recurrence": "sideways"}, "recurrence='sideways': allowed are 'layerwise'"),
        ({"prefix_attention": "open"}, "allowed are 'concat', 'gated'"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ({"context_segments": 0}, "context_segments=0: must be at least 1, or -1 for no cap"),
        ({"associative_memory": True, "recurrence": "top"}, "associative_memory needs a state in each layer"),
        ({"associative_memory": True, "pre_seq_len": 0}, "associative_memory needs a state in each layer"),
        ({"schedule": "wavefront", "recurrence": "top"}, 'schedule="wavefront" does not work with recurrence="top"'),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentBartConfig(**fields)


def test_a_plain_bart_configuration_is_taken_for_ours(tmp_path, recwarn):
    BartConfig(d_model=32, num_beams=4).save_pretrained(tmp_path)
    config = RecurrentBartConfig.from_pretrained(tmp_path, pre_seq_len=5)
    assert (config.model_type, config.d_model, config.pre_seq_len) == ("recurrent_bart", 32, 5)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is RecurrentBartConfig
    assert again.pre_seq_len == 5


def test_fields_given_at_loading_are_checked(tmp_path):
    BartConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be at most max_position_embeddings=64"):
        RecurrentBartConfig.from_pretrained(tmp_path, segment_size=128)


def test_a_new_segment_size_at_loading_brings_no_overlap(tmp_path):
    RecurrentBartConfig(segment_size=100).save_pretrained(tmp_path)
    assert RecurrentBartConfig.from_pretrained(tmp_path, segment_size=50).input_size == 50
    assert RecurrentBartConfig.from_pretrained(tmp_path).input_size == 100


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    MBartConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='mbart'; allowed are"):
        RecurrentBartConfig.from_pretrained(tmp_path)
