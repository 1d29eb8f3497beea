"""Bodies and options of requests, with their limits and their description in OpenAPI."""

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request

from recurrent_bart.inference.saved_state import QUERY_CHARACTERS
from recurrent_bart.serving.settings import Settings

# numbers that a request may give: type, least and largest value, meaning
NUMBERS: dict[str, tuple[type, float, float, str]] = {
    "num_beams": (int, 1, 8, "beams of the search; 1: greedy"),
    "max_new_tokens": (int, 1, 1024, "maximum number of tokens of a summary"),
    "min_new_tokens": (int, 0, 1024, "least tokens of a summary"),
    "no_repeat_ngram_size": (int, 0, 100, "length of the word groups that do not occur twice; 0: all may"),
    "length_penalty": (float, -10, 10, "above 0: longer summaries, with beams"),
    "repetition_penalty": (float, 0.1, 10, "above 1: fewer repetitions"),
    "position": (int, 0, 2**53, "characters sent before this piece; what the session has already is passed over"),
    "number": (int, 1, 2**53, "number of the section; the summary of a section that has ended is returned again"),
}
FLAGS = {
    "stream": "true: the answer is server-sent events: `text` for each piece, at last `end` with the summary",
    "citations": "true: with the passages of the text that each sentence was read from",
}
POSITION, NUMBER, WRITING, QUERY = ("position",), ("number",), tuple(FLAGS), ("query",)
GENERATION = tuple(name for name in NUMBERS if name not in POSITION + NUMBER)
QUERY_MEANING = "question about the text, for a model that was trained with questions"
# half of a character outside the first 65,536
SURROGATE = re.compile("[\ud800-\udfff]")


class BodyMemory:
    """Bytes of the bodies of all requests in progress."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.n_bytes = most_bytes, 0

    @contextlib.contextmanager
    def of_request(self) -> Iterator[Callable[[int], None]]:
        """Return a function that counts bytes of a request's body, or raises 503; the block's end frees the bytes."""
        n_own = 0

        def count(n_bytes: int) -> None:
            nonlocal n_own
            if self.n_bytes + n_bytes > self.most_bytes:
                raise HTTPException(503, "too many requests have large bodies; come again later", {"Retry-After": "5"})
            n_own += n_bytes
            self.n_bytes += n_bytes

        try:
            yield count
        finally:
            self.n_bytes -= n_own


async def read_body(request: Request, most_bytes: int, seconds: float) -> bytes:
    """Return the body: 413 if it is too large, 408 if it takes too long, 503 if all bodies take too much memory."""
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
                request.state.count_body(len(part))
                parts.append(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} seconds") from error
    return b"".join(parts)


async def read_text(
    request: Request, settings: Settings, allowed: Sequence[str], most_tokens: int
) -> tuple[str, dict[str, Any]]:
    """Return the text and the options of a request: a JSON object with `text`, or the text itself; else 400.

    `allowed` and `most_tokens` are as in `read_options`.
    """
    body = await read_body(request, settings.text_bytes, settings.body_seconds)
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind.startswith("multipart/"):
        raise HTTPException(415, "send the text itself as the body, not a form with a file")
    # large bodies take a while, in which other requests are answered
    read = _text_of_object if kind == "application/json" else _text_alone
    text, content = await asyncio.to_thread(read, body, settings.text_characters)
    return text, read_options(dict(request.query_params) | content, allowed, most_tokens)


async def read_query(request: Request, settings: Settings) -> str | None:
    """Return the question of a new session, from the URL or from a JSON body; None without a question."""
    options = read_options(request.query_params, QUERY, 0)
    body = await read_body(request, settings.text_bytes, settings.body_seconds)
    if body.strip():
        options |= read_options(await asyncio.to_thread(_parse_object, body), QUERY, 0)
    return options.get("query")


def _text_alone(body: bytes, most_characters: int) -> tuple[str, dict[str, Any]]:
    return _check_length(_decode(body), most_characters), {}


def _text_of_object(body: bytes, most_characters: int) -> tuple[str, dict[str, Any]]:
    content = _parse_object(body)
    text = content.pop("text", None)
    if not isinstance(text, str):
        raise HTTPException(400, "the body must be a JSON object with a text")
    # UTF-8 cannot have surrogates, but JSON can
    if SURROGATE.search(_check_length(text, most_characters)):
        raise HTTPException(400, "the text has half of a character: a lone surrogate")
    return text, content


def _check_length(text: str, most: int) -> str:
    if len(text) > most:
        raise HTTPException(413, f"the text has {len(text)} characters; at most {most} are allowed")
    return text


class ObjectDecoder(json.JSONDecoder):
    """Decoder of JSON without lists. Other threads run meanwhile; the usual decoder would hold them up for seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_array = _refuse_list
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _refuse_list(*_: Any) -> None:
    raise HTTPException(400, "the body must be a JSON object without lists")


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8: byte {error.start}") from error


def _parse_object(body: bytes) -> dict[str, Any]:
    text = _decode(body).removeprefix("\ufeff")
    try:
        content = ObjectDecoder().decode(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return content


def read_options(given: Mapping[str, Any], allowed: Sequence[str], most_tokens: int) -> dict[str, Any]:
    """Return the options of a request with their types; 400 if an option is unknown or out of range.

    Args:
        allowed: Names of the options that this kind of request has.
        most_tokens: Number of the decoder's positions.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in QUERY and name not in allowed:
            raise HTTPException(400, "a session has the query that it began with: POST /v1/sessions?query=...")
        if name not in allowed:
            raise HTTPException(400, f"unknown option; the options of this request are {', '.join(allowed) or 'none'}")
        if name in QUERY:
            found[name] = _query(value)
        else:
            found[name] = _flag(name, value) if name in FLAGS else _number(name, value, most_tokens)
    return found


def no_options(request: Request) -> None:
    """Refuse options of a request that has none."""
    read_options(request.query_params, (), 0)


def describe(allowed: Sequence[str], has_text: bool = False, has_object: bool = False) -> dict[str, Any]:
    """Return the description of a request's options for OpenAPI.

    Args:
        allowed: Names of the options.
        has_text: The body is either plain text, or a JSON object with the text and the options.
        has_object: The body may be JSON with options.
    """
    options = {name: _schema(name) for name in allowed}
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": schema["description"]}
        for name, schema in options.items()
    ]
    content: dict[str, Any]
    if has_object:
        content = {"application/json": {"schema": {"type": "object", "properties": options}}}
        return {"parameters": parameters, "requestBody": {"required": False, "content": content}}
    if not has_text:
        return {"parameters": parameters}
    text = {"type": "string", "description": "the text"}
    fields = {"type": "object", "required": ["text"], "properties": {"text": text, **options}}
    content = {"text/plain": {"schema": text}, "application/json": {"schema": fields}}
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def _schema(name: str) -> dict[str, Any]:
    if name in FLAGS:
        return {"type": "boolean", "description": FLAGS[name]}
    if name in QUERY:
        return {"type": "string", "description": QUERY_MEANING}
    kind, least, most, meaning = NUMBERS[name]
    number = "integer" if kind is int else "number"
    return {"type": number, "minimum": least, "maximum": most, "description": meaning}


def _query(value: Any) -> str:
    if isinstance(value, str) and len(value) > QUERY_CHARACTERS:
        raise HTTPException(400, f"query must have at most {QUERY_CHARACTERS} characters")
    if not isinstance(value, str) or SURROGATE.search(value):
        raise HTTPException(400, "query must be a text")
    return value


def _flag(name: str, value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise HTTPException(400, f"{name} must be true or false")
    return str(value).lower() == "true"


def _number(name: str, value: Any, most_tokens: int) -> Any:
    kind, least, most, _ = NUMBERS[name]
    if "new_tokens" in name:
        most = min(most, most_tokens)
    try:
        number = kind(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    # 0.9 is no position
    if isinstance(value, float) and number != value:
        number = math.nan
    if not least <= number <= most:
        raise HTTPException(400, f"{name} must be a number from {least:g} to {most:g}")
    return number
