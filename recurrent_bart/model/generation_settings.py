"""Settings of generation: which are in force, how long a text may be, and where targets contradict them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# set for every BART, or replaced by what a script gives: they say nothing about this model
COMMON = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "transformers_version"),
    *("max_length", "max_new_tokens", "num_beams", "_from_model_config"),
)
# nothing but beam search looks at them
OF_BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
# share of the targets above which a contradiction is worth a warning
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Contradiction:
    """A setting that some targets could not be generated with."""

    setting: str
    value: Any
    share: float
    remedy: str

    def __str__(self) -> str:
        return (
            f"warning: {100 * self.share:.0f} % of the targets could not be generated with {self.setting} "
            f"{self.value}, which the model was saved with; {self.remedy}"
        )


def longest_text(config: PreTrainedConfig, asked: int) -> int:
    """Return how many tokens a target or a generated text may have: those asked for, as the decoder has positions."""
    return min(asked, config.max_position_embeddings)


def describe_limit(config: PreTrainedConfig, asked: int) -> list[str]:
    """Return a warning if the decoder has fewer positions than tokens of a target were asked for."""
    if asked <= config.max_position_embeddings:
        return []
    limit = config.max_position_embeddings
    return [
        f"warning: --max_target_length {asked}: targets and generated texts end after {limit} tokens, as many as the "
        "decoder has positions for"
    ]


def change_settings(
    generation: GenerationConfig, given: Mapping[str, Any], max_new_tokens: int, num_beams: int | None = None
) -> None:
    """Change settings of a model, with which it is saved too.

    Args:
        generation: Settings of the model.
        given: Settings by name.
        max_new_tokens: Most tokens of a text.
        num_beams: Beams of the search; None: those of the model.

    Raises:
        ValueError: A setting cannot hold, or has no effect.
    """
    least = given.get("min_new_tokens")
    if least is not None and least > max_new_tokens:
        raise ValueError(f"--min_new_tokens {least}: a text has at most {max_new_tokens} tokens")
    num_beams = num_beams or generation.num_beams or 1
    if "length_penalty" in given:
        if num_beams == 1:
            raise ValueError("--length_penalty: it has no effect without beam search; set --num_beams")
        # what it was given for
        generation.num_beams = num_beams
    if "min_new_tokens" in given:
        # the older name of the same setting
        generation.min_length = None
    for name, value in given.items():
        setattr(generation, name, value)
    if given:
        # settings that have no effect, such as a length_penalty without beams, are an error when a changed one is
        # saved, and a warning when one is saved as it was loaded; they were there before
        generation._original_object_hash = hash(generation)


def describe_settings(generation: GenerationConfig, max_new_tokens: int, num_beams: int | None = None) -> str:
    """Return a line with all settings that texts are generated with.

    Args:
        generation: Settings of the model.
        max_new_tokens: Most tokens of a text.
        num_beams: Beams of the search; None: those of the model.
    """
    num_beams = num_beams or generation.num_beams or 1
    parts = [f"up to {max_new_tokens} tokens", "greedy" if num_beams == 1 else f"{num_beams} beams"]
    own = settings_of_model(generation, num_beams)
    if own:
        parts.append("of the model: " + ", ".join(f"{name} {value}" for name, value in own.items()))
    return f"generation {'; '.join(parts)}"


def settings_of_model(generation: GenerationConfig, num_beams: int) -> dict[str, Any]:
    """Return the settings that this model was saved with and that change its texts."""
    usual = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    found = {}
    for name, value in generation.to_dict().items():
        is_usual = value is None or value == usual.get(name) or name.startswith(("output_", "return_"))
        is_end = name == "forced_eos_token_id" and value == generation.eos_token_id
        if not (is_usual or is_end or name in COMMON or (num_beams == 1 and name in OF_BEAMS)):
            found[name] = value
    return found


def contradictions(generation: GenerationConfig, targets: Iterable[Sequence[int]]) -> list[Contradiction]:
    """Return the settings that more than a tenth of the targets contradict.

    Args:
        generation: Settings of the model.
        targets: Token ids of each, as the decoder is to generate them, special tokens included.
    """
    known = list(targets)
    if not known:
        return []
    least = _least_tokens(generation)
    name = "min_length" if generation.min_new_tokens is None else "min_new_tokens"
    size, first = generation.no_repeat_ngram_size or 0, generation.forced_bos_token_id
    found = [
        Contradiction(
            name,
            getattr(generation, name),
            _share(known, lambda target: len(target) - 1 < least),
            "--min_new_tokens 0 lifts it",
        ),
        Contradiction(
            "no_repeat_ngram_size",
            size,
            _share(known, lambda target: size > 0 and _repeats(target, size)),
            "--no_repeat_ngram_size 0 lifts it",
        ),
        Contradiction(
            "forced_bos_token_id",
            first,
            _share(known, lambda target: first is not None and target[0] != first),
            "change it in generation_config.json in the folder of the model",
        ),
    ]
    return [one for one in found if one.share >= LEAST_SHARE]


def _least_tokens(generation: GenerationConfig) -> int:
    """Return the number of tokens in front of which a text cannot end; `min_length` counts the decoder's start."""
    if generation.min_new_tokens is not None:
        return generation.min_new_tokens
    return max(0, (generation.min_length or 0) - 1)


def _share(targets: Sequence[Sequence[int]], is_so: Any) -> float:
    return sum(map(is_so, targets)) / len(targets)


def _repeats(target: Sequence[int], size: int) -> bool:
    grams = [tuple(target[start : start + size]) for start in range(len(target) - size + 1)]
    return len(set(grams)) < len(grams)
