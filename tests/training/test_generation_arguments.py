"""Flags of text generation: the same in every command, checked, and turned into settings of GenerationConfig."""

import argparse
from dataclasses import fields

import pytest
from transformers import GenerationConfig

from launching import load_script
from recurrent_bart.training.arguments import build_parser
from recurrent_bart.training.generation_arguments import GenerationArguments, add_generation_flags

FLAGS = {
    "num_beams": ("4", 4),
    "max_new_tokens": ("20", 20),
    "min_new_tokens": ("3", 3),
    "no_repeat_ngram_size": ("3", 3),
    "repetition_penalty": ("1.2", 1.2),
    "length_penalty": ("2", 2.0),
    "early_stopping": ("never", "never"),
    "do_sample": ("true", True),
    "temperature": ("0.7", 0.7),
    "top_p": ("0.9", 0.9),
}


def settings(namespace):
    return GenerationArguments(**{name: getattr(namespace, name) for name in FLAGS}).generation_settings()


def test_every_flag_becomes_the_setting_of_its_name():
    parser = argparse.ArgumentParser()
    add_generation_flags(parser)
    given = [f"--{name}={text}" for name, (text, _) in FLAGS.items()]
    expected = {name: value for name, (_, value) in FLAGS.items()}
    assert settings(parser.parse_args(given)) == expected
    assert settings(parser.parse_args([])) == {}
    assert all(hasattr(GenerationConfig(), name) for name in expected)
    assert settings(parser.parse_args(["--do_sample"])) == {"do_sample": True}
    for text, value in (("true", True), ("false", False)):
        assert settings(parser.parse_args([f"--early_stopping={text}"])) == {"early_stopping": value}


def test_every_command_has_the_same_flags_with_the_same_defaults(capsys):
    helps = {}
    for name in ("train", "evaluate", "summarize"):
        with pytest.raises(SystemExit):
            load_script(name).main(["--help"])
        helps[name] = capsys.readouterr().out
    for page in helps.values():
        text = "".join(page.split())
        for item in fields(GenerationArguments):
            assert f"--{item.name} " in page
            assert "".join(item.metadata["help"].split()) in text
    assert {action.default for action in build_parser()._actions if action.dest in FLAGS} == {None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "--num_beams 0: must be at least 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be at least 1"),
        ({"min_new_tokens": -1}, "--min_new_tokens -1: must be at least 0"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0: must be at least 0.001"),
        ({"repetition_penalty": float("inf")}, "--repetition_penalty inf: must be a finite number"),
        ({"temperature": float("nan")}, "--temperature nan: must be a finite number"),
        ({"temperature": 1e-40}, "--temperature 1e-40: must be at least 0.001"),
        ({"length_penalty": float("nan")}, "--length_penalty nan: must be a finite number"),
        ({"top_p": 1.1}, "--top_p 1.1: must be above 0 and at most 1"),
        ({"top_p": 0.0}, "--top_p 0.0: must be above 0 and at most 1"),
        ({"early_stopping": "yes"}, "--early_stopping yes: allowed are true, false, never"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments(**values)
