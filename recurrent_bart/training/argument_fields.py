"""Fields of argument dataclasses: flags with their help texts, and checks of their values."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from typing import Any


def flag(default: Any, text: str, aliases: Sequence[str] = ()) -> Any:
    """Declare a dataclass field with a default, the help text of its flag, and further names of the flag."""
    return field(default=default, metadata={"help": text, "aliases": list(aliases)})


def check_given(arguments: Any, may_be_empty: Sequence[str] = ()) -> None:
    """Raise ValueError if a number of an argument dataclass is not finite, or if a text is empty.

    The texts named in `may_be_empty` are not checked.
    """
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{item.name} {value}: must be a finite number")
        if isinstance(value, str) and not value.strip() and item.name not in may_be_empty:
            raise ValueError(f"--{item.name} {value!r}: must not be empty")


def check_at_least(arguments: Any, least: float, *names: str) -> None:
    """Raise ValueError if one of the named arguments is given and below `least`."""
    for name in names:
        value = getattr(arguments, name)
        # `not >=` refuses NaN too
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value}: must be at least {least:g}")


def check_above(arguments: Any, limit: float, name: str) -> None:
    """Raise ValueError if the named argument is given and not a finite number above `limit`."""
    value = getattr(arguments, name)
    if value is not None and not limit < value < math.inf:
        raise ValueError(f"--{name} {value}: must be above {limit:g}")


def check_at_most(arguments: Any, most: float, name: str) -> None:
    """Raise ValueError if the named argument is given and above `most`."""
    value = getattr(arguments, name)
    if value is not None and value > most:
        raise ValueError(f"--{name} {value}: must be at most {most:g}")


def check_below(arguments: Any, limit: float, name: str) -> None:
    """Raise ValueError if the named argument is given and not below `limit`."""
    value = getattr(arguments, name)
    if value is not None and value >= limit:
        raise ValueError(f"--{name} {value}: must be below {limit:g}")


def check_choice(arguments: Any, name: str, allowed: Iterable[str]) -> None:
    """Raise ValueError if the named argument is not among the allowed values."""
    if getattr(arguments, name) not in allowed:
        raise ValueError(f"--{name} {getattr(arguments, name)}: allowed are {', '.join(allowed)}")
