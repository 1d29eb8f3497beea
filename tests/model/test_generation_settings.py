"""Tests of a saved model's generation settings: printing, changing, and comparison with targets."""

import logging

import pytest
from transformers import GenerationConfig

from recurrent_bart import RecurrentBartConfig, RecurrentBartForConditionalGeneration
from recurrent_bart.model.generation_settings import (
    change_settings,
    contradictions,
    describe_limit,
    describe_settings,
    longest_text,
    text_length,
)
from tiny import tiny_model

# settings of facebook/bart-large-cnn
CNN = {
    "min_length": 56,
    "max_length": 142,
    "num_beams": 4,
    "early_stopping": True,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
USUAL = {name: CNN[name] for name in CNN if name.endswith("_token_id") and name != "forced_bos_token_id"}


def test_all_settings_that_change_texts_are_in_one_line():
    expected = "generation up to 64 tokens; 4 beams; "
    beams = describe_settings(GenerationConfig(**CNN), 64)
    assert beams.startswith(expected)
    assert sorted(beams.removeprefix(expected).split(", ")) == [
        "early_stopping True",
        "forced_bos_token_id 0",
        "length_penalty 2.0",
        "min_length 56",
        "no_repeat_ngram_size 3",
    ]
    # settings of beam search have no effect in greedy search
    greedy = describe_settings(GenerationConfig(**CNN | {"num_beams": 1}), 64)
    assert greedy.startswith("generation up to 64 tokens; greedy; ")
    assert "length_penalty" not in greedy
    assert "min_length 56" in greedy


def test_a_model_without_settings_of_its_own_has_a_short_line():
    assert describe_settings(GenerationConfig(**USUAL, num_beams=2), 8) == "generation up to 8 tokens; 2 beams"
    assert describe_settings(tiny_model().generation_config, 8) == "generation up to 8 tokens; greedy"


def targets(length, n_targets=10):
    """Return lists of different ids between BART's special tokens."""
    return [[0, *range(4 + number, 2 + number + length), 2] for number in range(n_targets)]


@pytest.mark.parametrize(
    ("settings", "length", "n_contradicted"),
    [
        # 55 tokens, then the end token
        ({"min_length": 56}, 55, 1),
        ({"min_length": 56}, 56, 0),
        ({"min_new_tokens": 56}, 56, 1),
        ({"min_new_tokens": 56}, 57, 0),
        ({"min_length": 90, "min_new_tokens": 4}, 57, 0),
        ({"forced_bos_token_id": 0}, 8, 0),
        ({"forced_bos_token_id": 7}, 8, 1),
        ({"no_repeat_ngram_size": 3}, 30, 0),
        ({}, 4, 0),
    ],
)
def test_targets_that_could_not_be_generated_are_told(settings, length, n_contradicted):
    found = contradictions(GenerationConfig(**settings), targets(length))
    assert [one.setting for one in found] == list(settings)[:n_contradicted]


def test_the_warning_names_setting_share_and_remedy():
    repeated = [[0, 5, 6, 7, 5, 6, 7, 2]] * 2 + targets(8, n_targets=8)
    (found,) = contradictions(GenerationConfig(no_repeat_ngram_size=3), repeated)
    assert str(found) == (
        "warning: 20 % of the targets cannot be generated with the model's setting no_repeat_ngram_size 3; remove this "
        "limit with --no_repeat_ngram_size 0"
    )
    # no warning for a small share
    assert not contradictions(GenerationConfig(no_repeat_ngram_size=3), repeated[:1] + targets(8, n_targets=20))
    assert not contradictions(GenerationConfig(no_repeat_ngram_size=3), [])


@pytest.mark.parametrize("least", [0, 5])
def test_what_the_warning_says_can_be_generated_is_what_generate_does(least):
    """Check that `min_length` yields as many tokens as the warning assumes, and that a flag changes it."""
    model = tiny_model(forced_eos_token_id=None).eval()
    model.final_logits_bias[:, model.config.eos_token_id] = 1e4
    model.generation_config.min_length = 12

    def n_tokens():
        ids = model.generate(inputs=model.dummy_inputs["input_ids"][:1], max_new_tokens=20)[0].tolist()
        # skip the decoder's start token
        return ids[1:].index(model.config.eos_token_id) + 1

    assert n_tokens() == 12
    assert contradictions(model.generation_config, targets(11))
    assert not contradictions(model.generation_config, targets(12))
    change_settings(model.generation_config, {"min_new_tokens": least}, 20)
    assert n_tokens() == least + 1
    assert not contradictions(model.generation_config, targets(least + 1 if least else 2))


def test_settings_that_were_given_are_saved_with_the_model(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(**USUAL, min_length=56)
    given = {"min_new_tokens": 0, "no_repeat_ngram_size": 2, "length_penalty": 0.5, "num_beams": 3}
    change_settings(model.generation_config, given, 20)
    model.save_pretrained(tmp_path)
    saved = RecurrentBartForConditionalGeneration.from_pretrained(tmp_path).generation_config
    line = describe_settings(saved, 20)
    assert line.startswith("generation up to 20 tokens; 3 beams; ")
    for part in ("min_new_tokens 0", "no_repeat_ngram_size 2", "length_penalty 0.5"):
        assert part in line
    assert "min_length" not in line


def test_a_changed_model_with_settings_that_have_no_effect_can_be_saved(tmp_path):
    model = tiny_model()
    GenerationConfig(**USUAL, num_beams=2, length_penalty=2.0).save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    model.generation_config.num_beams = None
    change_settings(model.generation_config, {"min_new_tokens": 3}, 20)
    model.save_pretrained(tmp_path)
    saved = RecurrentBartForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (saved.min_new_tokens, saved.length_penalty) == (3, 2.0)


def test_settings_that_cannot_hold_are_refused():
    generation = GenerationConfig(**USUAL)
    with pytest.raises(ValueError, match="--min_new_tokens 21: must be at most 20, the maximum length of a text"):
        change_settings(generation, {"min_new_tokens": 21}, 20)
    with pytest.raises(ValueError, match="--length_penalty has no effect without beam search"):
        change_settings(generation, {"length_penalty": 2.0}, 20)
    change_settings(GenerationConfig(**CNN), {"length_penalty": 2.0}, 20)
    for name, value in {"temperature": 0.7, "top_p": 0.9}.items():
        with pytest.raises(ValueError, match=f"--{name} has no effect without sampling; set --do_sample"):
            change_settings(generation, {name: value}, 20)
        change_settings(generation, {name: value, "do_sample": True}, 20)
        assert getattr(generation, name) == value
        generation.do_sample = None


def test_sampling_and_its_settings_are_in_the_line():
    generation = GenerationConfig(**USUAL, temperature=0.7)
    assert describe_settings(generation, 8) == "generation up to 8 tokens; greedy"
    change_settings(generation, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}, 8)
    line = describe_settings(generation, 8)
    assert line.startswith("generation up to 8 tokens; sampling; ")
    assert sorted(line.split("; ")[2].split(", ")) == ["repetition_penalty 1.2", "temperature 0.7", "top_p 0.9"]
    change_settings(generation, {"num_beams": 3}, 8)
    assert describe_settings(generation, 8).startswith("generation up to 8 tokens; 3 beams with sampling; ")


@pytest.mark.parametrize(
    ("given", "saved", "expected"), [({}, None, 40), ({}, 30, 30), ({"max_new_tokens": 20}, 30, 20), ({}, 99, 64)]
)
def test_the_length_of_texts_is_the_given_one_or_the_models_or_the_targets(given, saved, expected):
    config = RecurrentBartConfig(max_position_embeddings=64)
    assert text_length(config, GenerationConfig(max_new_tokens=saved), given, 40) == expected
    with pytest.raises(ValueError, match="--max_new_tokens 65: must be at most 64, the positions of the decoder"):
        text_length(config, GenerationConfig(), {"max_new_tokens": 65}, 40)


def test_a_text_has_no_more_tokens_than_the_decoder_has_positions():
    config = RecurrentBartConfig(max_position_embeddings=64)
    assert longest_text(config, 128) == 64
    assert longest_text(config, 64) == 64
    assert describe_limit(config, 64) == []
    assert "--max_target_length 128: targets and generated texts end after 64 tokens" in describe_limit(config, 128)[0]


def test_as_many_tokens_as_there_are_positions_can_be_generated():
    model = tiny_model(max_position_embeddings=16, forced_eos_token_id=None).eval()
    model.final_logits_bias[:, model.config.eos_token_id] = -1e4
    ids = model.generate(inputs=model.dummy_inputs["input_ids"][:1], max_new_tokens=longest_text(model.config, 99))
    assert ids.shape[1] == 1 + 16


def test_a_models_older_maximum_length_is_replaced_without_a_warning(tmp_path):
    model = tiny_model().eval()
    model.generation_config.max_length = 30
    model.final_logits_bias[:, model.config.eos_token_id] = -1e4
    logger, told = logging.getLogger("transformers.generation.utils"), []

    def note(record):
        told.append(record.getMessage())
        return False

    logger.addFilter(note)
    try:
        model.generate(model.dummy_inputs["input_ids"][:1], max_new_tokens=9)
        assert "Both `max_new_tokens`" in told.pop()
        change_settings(model.generation_config, {}, 9)
        ids = model.generate(model.dummy_inputs["input_ids"][:1], max_new_tokens=9)
        assert model.generate(model.dummy_inputs["input_ids"][:1]).equal(ids)
    finally:
        logger.removeFilter(note)
    assert told == []
    assert ids.shape[1] == 1 + 9
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.max_new_tokens, saved.max_length) == (9, None)


def test_settings_that_a_given_flag_makes_useless_are_dropped():
    generation = GenerationConfig(**CNN, num_return_sequences=3)
    change_settings(generation, {"num_beams": 1}, 142)
    assert (generation.num_beams, generation.length_penalty, generation.early_stopping) == (1, None, None)
    assert generation.num_return_sequences is None
    generation = GenerationConfig(**USUAL, do_sample=True, temperature=0.7, top_p=0.9)
    change_settings(generation, {"do_sample": False}, 142)
    assert (generation.temperature, generation.top_p) == (None, None)


def test_a_given_length_below_the_models_own_minimum_is_refused():
    with pytest.raises(ValueError, match="--max_new_tokens 10: the model's own minimum is 55 tokens; set --min_new"):
        change_settings(GenerationConfig(**CNN), {"max_new_tokens": 10}, 10)
    change_settings(GenerationConfig(**CNN), {"max_new_tokens": 10, "min_new_tokens": 0}, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beam": 2}, "num_beam: no setting of generation; did you mean num_beams"),
        ({"zzzz": 2}, "zzzz: no setting of generation$"),
        ({"num_beams": 0}, "--num_beams 0: must be at least 1"),
    ],
)
def test_a_wrong_name_or_number_is_refused(given, message):
    generation = GenerationConfig()
    with pytest.raises(ValueError, match=message):
        change_settings(generation, given, 8)
    assert generation.max_new_tokens is None
