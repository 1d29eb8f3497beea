"""Bodies and options of requests, with their limits."""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Request

# settings of generation that a request may change: type, least and largest value
OPTIONS: dict[str, tuple[type, float, float]] = {
    "num_beams": (int, 1, 8),
    "max_new_tokens": (int, 1, 1024),
    "min_new_tokens": (int, 0, 1024),
    "no_repeat_ngram_size": (int, 0, 100),
    "length_penalty": (float, -10, 10),
    "repetition_penalty": (float, 0.1, 10),
}
FLAGS = ("stream", "citations")
OTHERS = (*FLAGS, "position", "query")


async def read_body(request: Request, most_bytes: int, seconds: float) -> bytes:
    """Return the body of a request: 413 if it is too large, 408 if it takes too long."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes:
        raise HTTPException(413, f"the body has {length} bytes; at most {most_bytes} are allowed")
    parts, n_bytes = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > most_bytes:
                    raise HTTPException(413, f"the body is too large; at most {most_bytes} bytes are allowed")
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} seconds") from error
    return b"".join(parts)


def read_text(request: Request, body: bytes, most_tokens: int) -> tuple[str, dict[str, Any]]:
    """Return the text and the options of a body: a JSON object with `text`, or the text itself; else 400."""
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind.startswith("multipart/"):
        raise HTTPException(415, "send the text itself as the body, not a form with a file")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8: byte {error.start}") from error
    given: dict[str, Any] = dict(request.query_params)
    if kind == "application/json":
        content = read_object(body)
        if not isinstance(content.get("text"), str):
            raise HTTPException(400, "the body must be a JSON object with a text")
        text = content.pop("text")
        given |= content
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise HTTPException(400, "the text has half of a character: a lone surrogate")
    return text, read_options(given, most_tokens)


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; 400 if the body is no JSON object."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return content


def read_options(given: Mapping[str, Any], most_tokens: int) -> dict[str, Any]:
    """Return the options of a request with their types; 400 if an option is unknown or out of range.

    `most_tokens` is the number of the decoder's positions.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in FLAGS:
            found[name] = _flag(name, value)
        elif name == "position":
            found[name] = _number(name, value, int, 0, 2**53)
        elif name == "query":
            found[name] = _query(value)
        elif name in OPTIONS:
            kind, least, most = OPTIONS[name]
            found[name] = _number(name, value, kind, least, min(most, most_tokens) if "new_tokens" in name else most)
        else:
            allowed = ", ".join((*OPTIONS, *OTHERS))
            raise HTTPException(400, f"unknown option; the options are {allowed}")
    return found


def _query(value: Any) -> str:
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise HTTPException(400, "query must be a text")
    return value


def _flag(name: str, value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise HTTPException(400, f"{name} must be true or false")
    return str(value).lower() == "true"


def _number(name: str, value: Any, kind: type, least: float, most: float) -> Any:
    try:
        number = kind(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise HTTPException(400, f"{name} must be a number from {least:g} to {most:g}")
    return number
