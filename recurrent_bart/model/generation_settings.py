"""Settings of text generation: active settings, the longest text, and settings that contradict the targets."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# settings that every BART has, or that a script's flags replace
COMMON = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "transformers_version"),
    *("max_length", "max_new_tokens", "num_beams", "do_sample", "_from_model_config"),
)
# settings that only beam search reads
BEAM_SETTINGS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
# settings that only sampling reads
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "typical_p", "min_p")
# most tokens of a target or summary, unless a flag or the model sets another number
MAX_TARGET_LENGTH = 128
# share of contradicting targets from which on a warning is printed
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Contradiction:
    """Generation setting that makes some of the targets impossible to generate."""

    setting: str
    value: Any
    share: float
    remedy: str

    def __str__(self) -> str:
        return (
            f"warning: {100 * self.share:.0f} % of the targets cannot be generated with the model's setting "
            f"{self.setting} {self.value}; {self.remedy}"
        )


def longest_text(config: PreTrainedConfig, asked: int) -> int:
    """Return the largest length of a target or generated text: `asked` or the decoder's number of positions."""
    return min(asked, config.max_position_embeddings)


def describe_limit(config: PreTrainedConfig, asked: int) -> list[str]:
    """Return a warning if `asked` target tokens exceed the decoder's positions."""
    if asked <= config.max_position_embeddings:
        return []
    limit = config.max_position_embeddings
    return [
        f"warning: --max_target_length {asked}: targets and generated texts end after {limit} tokens, the number of "
        "positions of the decoder"
    ]


def text_length(config: PreTrainedConfig, generation: GenerationConfig, given: Mapping[str, Any], usual: int) -> int:
    """Return the maximum number of tokens of a generated text: the given setting, else the model's, else `usual`.

    Raises:
        ValueError: The given `max_new_tokens` exceeds the decoder's positions.
    """
    most = longest_text(config, given.get("max_new_tokens") or generation.max_new_tokens or usual)
    if given.get("max_new_tokens", 0) > most:
        raise ValueError(
            f"--max_new_tokens {given['max_new_tokens']}: must be at most {most}, the positions of the decoder"
        )
    return most


def check_names(given: Mapping[str, Any]) -> None:
    """Raise ValueError if a name is no setting of GenerationConfig, or if there is no beam."""
    known = vars(GenerationConfig())
    for name in given:
        if name not in known and name != "fast":
            close = difflib.get_close_matches(name, [known_name for known_name in known if known_name[0] != "_"], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name}: no setting of generation{hint}")
    if given.get("num_beams", 1) is not None and given.get("num_beams", 1) < 1:
        raise ValueError(f"--num_beams {given['num_beams']}: must be at least 1")


def change_settings(generation: GenerationConfig, given: Mapping[str, Any], max_new_tokens: int) -> None:
    """Change generation settings in place; raise ValueError if a setting is impossible or has no effect.

    `max_new_tokens` becomes the model's setting. It replaces the older `max_length`, because transformers warns if both
    are set.
    """
    check_names(given)
    least = given.get("min_new_tokens")
    if least is not None and least > max_new_tokens:
        raise ValueError(f"--min_new_tokens {least}: must be at most {max_new_tokens}, the maximum length of a text")
    for name in without_effect(*(given.get(name, getattr(generation, name)) for name in ("num_beams", "do_sample"))):
        if name in given:
            needed = (
                "beam search; set --num_beams to 2 or more" if name in BEAM_SETTINGS else "sampling; set --do_sample"
            )
            raise ValueError(f"--{name} has no effect without {needed}")
    if "min_new_tokens" in given:
        # older name of the same setting
        generation.min_length = None
    dropped = dict.fromkeys(without_effect(given.get("num_beams", 2), given.get("do_sample", True)))
    for name, value in (dropped | dict(given)).items():
        setattr(generation, name, value)
    if (generation.num_return_sequences or 1) > 1:
        # a document has one text
        generation.num_return_sequences = None
    if "max_new_tokens" in given and _least_tokens(generation) > max_new_tokens:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens}: the model's own minimum is {_least_tokens(generation)} tokens; set "
            "--min_new_tokens too"
        )
    generation.max_new_tokens, generation.max_length = max_new_tokens, None
    # transformers raises on save if a setting was changed and any setting has no effect, for example a length_penalty
    # without beams. It only warns if the settings are as loaded. The ineffective ones were there before, so mark them
    # as loaded
    generation._original_object_hash = hash(generation)


def without_effect(num_beams: int | None, do_sample: bool | None) -> tuple[str, ...]:
    """Return the names of the settings that generation does not read, because it uses no beams or no sampling."""
    return (BEAM_SETTINGS if (num_beams or 1) == 1 else ()) + (() if do_sample else SAMPLING_SETTINGS)


def describe_settings(generation: GenerationConfig, max_new_tokens: int) -> str:
    """Return a line with all settings that texts are generated with."""
    num_beams = generation.num_beams or 1
    kinds = [f"{num_beams} beams"] if num_beams > 1 else []
    kinds += ["sampling"] if generation.do_sample else []
    parts = [f"up to {max_new_tokens} tokens", " with ".join(kinds) or "greedy"]
    own = settings_of_model(generation, num_beams)
    if own:
        parts.append(", ".join(f"{name} {value}" for name, value in own.items()))
    return f"generation {'; '.join(parts)}"


def settings_of_model(generation: GenerationConfig, num_beams: int) -> dict[str, Any]:
    """Return the settings that differ from the usual ones and that change the texts."""
    usual = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    unread = without_effect(num_beams, generation.do_sample)
    found = {}
    for name, value in generation.to_dict().items():
        is_usual = value is None or value == usual.get(name) or name.startswith(("output_", "return_"))
        is_end = name == "forced_eos_token_id" and value == generation.eos_token_id
        if not (is_usual or is_end or name in unread or name in COMMON):
            found[name] = value
    return found


def contradictions(generation: GenerationConfig, targets: Iterable[Sequence[int]]) -> list[Contradiction]:
    """Return the settings that at least `LEAST_SHARE` of the targets, with special tokens, contradict."""
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
            "remove this limit with --min_new_tokens 0",
        ),
        Contradiction(
            "no_repeat_ngram_size",
            size,
            _share(known, lambda target: size > 0 and _repeats(target, size)),
            "remove this limit with --no_repeat_ngram_size 0",
        ),
        Contradiction(
            "forced_bos_token_id",
            first,
            _share(known, lambda target: first is not None and target[0] != first),
            "change the setting in generation_config.json in the folder of the model",
        ),
    ]
    return [one for one in found if one.share >= LEAST_SHARE]


def _least_tokens(generation: GenerationConfig) -> int:
    """Return the fewest tokens before the end token; `min_length` also counts the decoder's start token."""
    if generation.min_new_tokens is not None:
        return generation.min_new_tokens
    return max(0, (generation.min_length or 0) - 1)


def _share(targets: Sequence[Sequence[int]], is_so: Any) -> float:
    return sum(map(is_so, targets)) / len(targets)


def _repeats(target: Sequence[int], size: int) -> bool:
    grams = [tuple(target[start : start + size]) for start in range(len(target) - size + 1)]
    return len(set(grams)) < len(grams)
