"""Flags of text generation, the same in training, evaluation and use."""

import argparse
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import HfArgumentParser

from recurrent_bart.training.argument_fields import check_at_least, check_choice, check_given, flag
from recurrent_bart.training.flags import allow_bare_booleans

OF_MODEL = "if not given: the model's generation_config.json"
# names and values of --early_stopping
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


@dataclass(kw_only=True)
class GenerationArguments:
    """Flags of text generation. Without a flag, the model's value holds; given flags are saved with the model."""

    _argument_group_name: ClassVar[str] = "generation"

    num_beams: int | None = flag(
        None, f"number of beams of beam search; 1: greedy search or sampling; {OF_MODEL}, else 1"
    )
    max_new_tokens: int | None = flag(
        None,
        "maximum number of tokens of a generated text; if not given: in training --max_target_length, later the "
        "model's generation_config.json",
    )
    min_new_tokens: int | None = flag(None, f"fewest tokens of a generated text; 0: no minimum; {OF_MODEL}")
    no_repeat_ngram_size: int | None = flag(
        None,
        f"length in tokens of the sequences that no generated text contains twice; 0: no restriction; {OF_MODEL}",
    )
    repetition_penalty: float | None = flag(
        None, f"number that divides the scores of tokens that the text already has; 1: no penalty; {OF_MODEL}"
    )
    length_penalty: float | None = flag(
        None, f"exponent of the text length in beam search; higher values give longer texts; {OF_MODEL}"
    )
    early_stopping: str | None = flag(
        None,
        "end of beam search: true: as soon as num_beams texts are finished; false: when a better text is unlikely; "
        f"never: when a better text is impossible; {OF_MODEL}",
    )
    do_sample: bool | None = flag(None, f"draw each token at random instead of the most likely one; {OF_MODEL}")
    temperature: float | None = flag(
        None, f"with --do_sample: divisor of the scores; below 1, likely tokens become more likely; {OF_MODEL}"
    )
    top_p: float | None = flag(
        None, f"with --do_sample: draw only from the likeliest tokens that together have this probability; {OF_MODEL}"
    )

    def __post_init__(self) -> None:
        check_given(self)
        check_at_least(self, 1, "num_beams", "max_new_tokens")
        check_at_least(self, 0, "min_new_tokens", "no_repeat_ngram_size")
        # smaller divisors make scores infinite
        check_at_least(self, 0.001, "temperature", "repetition_penalty")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if self.early_stopping is not None:
            check_choice(self, "early_stopping", EARLY_STOPPING)

    def generation_settings(self) -> dict[str, Any]:
        """Return the flags that were given, as settings of `GenerationConfig`."""
        values = {item.name: getattr(self, item.name) for item in fields(GenerationArguments)}
        given = {name: value for name, value in values.items() if value is not None}
        if "early_stopping" in given:
            given["early_stopping"] = EARLY_STOPPING[given["early_stopping"]]
        return given


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `GenerationArguments` to a parser without dataclasses."""
    own = HfArgumentParser(GenerationArguments, add_help=False, allow_abbrev=False)
    allow_bare_booleans(own)
    group = parser.add_argument_group(GenerationArguments._argument_group_name)
    for action in own._actions:
        group._add_action(action)
