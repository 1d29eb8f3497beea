"""Tests of the values that the configuration accepts, derives and refuses."""

import json

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


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("pegasus", "its positions are sinusoidal"),
        ("plbart", "its shift of labels is MBart's"),
        ("t5", "relative position biases"),
        ("gpt2", ""),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, model_type, reason):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    allowed = f"model_type={model_type!r}; allowed are 'bart', 'mbart', 'recurrent_bart'"
    with pytest.raises(ValueError, match=f"{allowed}.*{reason}"):
        RecurrentBartConfig.from_pretrained(tmp_path)


# fields that differ from MBartConfig's defaults, and fields of older versions
MBARTS = {
    "no start token": {"normalize_before": True, "add_final_layer_norm": True, "scale_embedding": True},
    "start token": {"decoder_start_token_id": 2, "normalize_before": True, "scale_embedding": True},
    "unused fields": {"decoder_start_token_id": 2, "add_final_layer_norm": False, "normalize_before": False},
}


@pytest.mark.parametrize("fields", MBARTS.values(), ids=MBARTS)
def test_a_checkpoint_of_mbart_gives_its_layout_which_is_saved(tmp_path, fields):
    MBartConfig(**fields).save_pretrained(tmp_path)
    config = RecurrentBartConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "saved")
    for one in (config, RecurrentBartConfig.from_pretrained(tmp_path / "saved")):
        assert one.normalize_before
        assert one.wraps_last_label
        assert one.decoder_start_token_id == fields.get("decoder_start_token_id")
        assert one.scale_embedding == fields.get("scale_embedding", False)


def test_a_configuration_without_the_fields_of_mbart_has_the_layout_of_bart(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "recurrent_bart", "pre_seq_len": 5}))
    config = RecurrentBartConfig.from_pretrained(tmp_path)
    assert not config.normalize_before
    assert not config.wraps_last_label
    assert config.decoder_start_token_id == 2


def test_mbart_with_sinusoidal_positions_is_refused(tmp_path):
    MBartConfig(static_position_embeddings=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="static_position_embeddings=True belongs to a different architecture"):
        RecurrentBartConfig.from_pretrained(tmp_path)
