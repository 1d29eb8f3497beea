"""Model that the flags ask for."""

import logging

import pytest
import torch
from tokenizers import processors

from recurrent_bart import RecurrentBartForConditionalGeneration
from recurrent_bart.data.rows import TASKS
from recurrent_bart.data.tokenizer import train_tokenizer
from recurrent_bart.inference.stream_reader import load_model
from recurrent_bart.model.loading import is_recurrence
from recurrent_bart.training.model_arguments import ModelArguments
from recurrent_bart.training.model_building import SIZES, build_config, build_model
from tiny import plain_model


class Tokenizer:
    """Tokenizer stub with the vocabulary size and special ids of facebook/bart-base."""

    bos_token_id, pad_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size=50265):
        self.size = size

    def __len__(self):
        return self.size


@pytest.fixture
def pretrained(bart, tmp_path):
    bart.save_pretrained(tmp_path / "bart")
    return str(tmp_path / "bart")


@pytest.mark.parametrize(("size", "millions"), [("base", 139.420416), ("large", 406.291456)])
def test_base_and_large_have_the_size_of_the_published_models(size, millions):
    config = build_config(ModelArguments(model_size=size), Tokenizer())
    with torch.device("meta"):
        model = RecurrentBartForConditionalGeneration(config)
    counts = [parameter.numel() for name, parameter in model.named_parameters() if not is_recurrence(name)]
    assert sum(counts) / 1e6 == millions
    assert (config.max_position_embeddings, config.segment_size) == (1024, 512)


def test_sizes_grow():
    configs = [build_config(ModelArguments(model_size=size), Tokenizer()) for size in SIZES]
    assert list(SIZES) == ["tiny", "small", "base", "large"]
    widths = [config.d_model for config in configs]
    assert widths == sorted(set(widths))


def test_a_model_from_scratch_has_the_tokenizers_ids():
    tokenizer = train_tokenizer(["some words to train on"] * 20, vocab_size=300)
    config = build_config(ModelArguments(), tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.decoder_start_token_id == config.forced_eos_token_id == 2


def test_flags_change_the_size_and_a_pretrained_model(pretrained):
    changes = {"segment_size": 16, "pre_seq_len": 5, "bptt_depth": 1, "prefix_projection": False, "dropout": 0.3}
    scratch = build_config(ModelArguments(**changes), Tokenizer(60))
    converted = build_config(ModelArguments(model_name_or_path=pretrained, **changes), Tokenizer(60))
    for name, value in changes.items():
        assert getattr(scratch, name) == getattr(converted, name) == value
    assert converted.d_model == 16


def test_the_decoder_of_a_new_model_sees_the_section_that_it_writes_of(pretrained, tmp_path):
    given = {"decoder_context": "memory"}
    saved = str(tmp_path / "ours")
    build_config(ModelArguments(**given), Tokenizer(60)).save_pretrained(saved)
    for start, expected in ((None, "section"), (pretrained, "section"), (saved, "memory")):
        arguments = ModelArguments(model_name_or_path=start)
        assert build_config(arguments, Tokenizer(60), "sections").decoder_context == expected
    for start in (None, pretrained):
        default = build_config(ModelArguments(model_name_or_path=start), Tokenizer(60))
        assert (default.decoder_context, default.bptt_depth) == ("all", -1)
        changed = build_config(ModelArguments(model_name_or_path=start, decoder_context="last"), Tokenizer(60))
        assert (changed.decoder_context, changed.bptt_depth) == ("last", 2)
        changed = build_config(ModelArguments(model_name_or_path=start, bptt_depth=1), Tokenizer(60))
        assert (changed.decoder_context, changed.bptt_depth) == ("all", 1)
        changed = ModelArguments(model_name_or_path=start, **given)
        assert build_config(changed, Tokenizer(60), "sections").decoder_context == "memory"


@pytest.mark.parametrize("context", ["last", "section"])
def test_one_that_was_saved_sees_what_it_saw(tmp_path, context):
    build_config(ModelArguments(decoder_context=context), Tokenizer(60)).save_pretrained(tmp_path)
    # a model that recalls must not see the tokens of earlier segments
    for task in {*TASKS} - {"recall"}:
        arguments = ModelArguments(model_name_or_path=str(tmp_path))
        assert build_config(arguments, Tokenizer(60), task).decoder_context == context


def test_a_pretrained_model_keeps_its_weights_and_trains_in_float32(pretrained, bart):
    arguments = ModelArguments(model_name_or_path=pretrained)
    model = build_model(arguments, build_config(arguments, Tokenizer(60)), seed=0)
    weights = dict(model.named_parameters())
    for name, weight in bart.named_parameters():
        assert torch.equal(weights[name], weight), name
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(module.training for module in model.modules())


@pytest.fixture
def logged(caplog):
    """Capture each warning of transformers once."""
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    # launch/benchmark.py, which may have run in this process, shows errors only
    logger.setLevel(logging.WARNING)
    # with the environment variable CI, transformers also sends its records to the root logger, where caplog is
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate


def test_that_the_recurrence_is_new_is_said_in_one_line(pretrained, capsys, logged, tmp_path):
    arguments = ModelArguments(model_name_or_path=pretrained)
    model = build_model(arguments, build_config(arguments, Tokenizer(40)), seed=0)
    size = sum(p.numel() for name, p in model.named_parameters() if is_recurrence(name)) / 1e6
    line = f"new        the recurrence ({size:.1f} M parameters) is new and untrained; {pretrained} has no recurrence\n"
    assert capsys.readouterr().out == line
    assert not logged.records
    # a saved Recurrent BART has no new parameters
    model.save_pretrained(tmp_path / "saved")
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "saved"))
    build_model(arguments, build_config(arguments, Tokenizer(40)), seed=0)
    assert capsys.readouterr().out == ""
    assert not logged.records


def test_other_weights_that_are_missing_are_still_told_of(bart, capsys, logged, tmp_path):
    weights = {name: value for name, value in bart.state_dict().items() if "encoder.layers.0.fc1" not in name}
    bart.save_pretrained(tmp_path / "bart", state_dict=weights)
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "bart"))
    build_model(arguments, build_config(arguments, Tokenizer(40)), seed=0)
    assert capsys.readouterr().out == ""
    (record,) = logged.records
    assert "encoder.layers.0.fc1" in record.getMessage()


def test_a_plain_bart_that_is_to_write_is_warned_of(pretrained, capsys, logged):
    train_tokenizer(["a b c"], vocab_size=320).save_pretrained(pretrained)
    load_model(pretrained, torch.device("cpu"), torch.float32)
    assert "warning: the recurrence (" in capsys.readouterr().err
    assert not logged.records


def test_a_checkpoint_in_half_precision_is_trained_in_float32(bart, tmp_path):
    bart.bfloat16().save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    model = build_model(arguments, build_config(arguments, Tokenizer(60)), seed=0)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_seed_decides_the_weights():
    arguments = ModelArguments(pre_seq_len=2)
    config = build_config(arguments, Tokenizer(60))
    first, second, other = (build_model(arguments, config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_size": "huge"}, "--model_size huge: allowed are tiny, small, base, large"),
        ({"segment_size": 2000}, "segment_size=2000, .* must be at most max_position_embeddings=1024"),
        ({"pre_seq_len": -1}, "pre_seq_len=-1: must be at least 0"),
        ({"prefix_attention": "none"}, "prefix_attention='none': allowed are 'concat', 'gated'"),
        ({"model_name_or_path": "no/such/folder"}, "--model_name_or_path no/such/folder: "),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_config(ModelArguments(**changes), Tokenizer())
    assert "\n" not in str(caught.value)


def test_a_segment_over_a_pretrained_models_positions_is_refused(pretrained, bart):
    positions = bart.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"segment_size={positions + 1}.*max_position_embeddings={positions}"):
        build_config(ModelArguments(model_name_or_path=pretrained, segment_size=positions + 1), Tokenizer(60))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(pretrained):
    with pytest.raises(ValueError, match=r"the tokenizer has 61 ids, but .*bart has only 60"):
        build_config(ModelArguments(model_name_or_path=pretrained), Tokenizer(61))


def test_a_pretrained_model_that_drops_layers_is_refused(bart, tmp_path):
    bart.config.decoder_layerdrop = 0.1
    bart.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder_layerdrop is 0.1 in config.json; training needs the value 0"):
        build_config(ModelArguments(model_name_or_path=str(tmp_path)), Tokenizer(60))


def test_a_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="model_type='t5'; allowed are"):
        build_config(ModelArguments(model_name_or_path=str(tmp_path)), Tokenizer())


def test_mbart_needs_a_tokenizer_that_ends_targets(tmp_path):
    tokenizer = train_tokenizer(["a b c"], vocab_size=320)
    plain_model("mbart", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), segment_size=16)
    model = build_model(arguments, build_config(arguments, tokenizer), seed=0)
    assert model.generation_config.decoder_start_token_id == tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="the tokenizer adds no token after a target"):
        build_config(arguments, tokenizer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"pad_token_id": 2}, "pad_token_id 2, not 1"),
        ({"eos_token_id": 1, "pad_token_id": 2}, "pad_token_id 2, not 1; eos_token_id 1, not 2"),
        ({"bos_token_id": 5}, "bos_token_id 5, not 0"),
    ],
)
def test_a_tokenizer_with_other_special_ids_than_the_model_is_refused(pretrained, ids, message):
    tokenizer = Tokenizer(60)
    vars(tokenizer).update(ids)
    with pytest.raises(ValueError, match=f"--tokenizer_name other and .*bart have different special ids: {message}"):
        build_config(ModelArguments(model_name_or_path=pretrained, tokenizer_name="other"), tokenizer)
    # a new model gets the tokenizer's special ids
    config = build_config(ModelArguments(), tokenizer)
    assert all(getattr(config, name) == value for name, value in ids.items())
