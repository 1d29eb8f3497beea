"""Routes of the service: monitoring and documentation, summaries, sessions."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer

from recurrent_bart.data.text_files import with_line_feeds
from recurrent_bart.inference.reading_session import ReadingSession, ReadText, Steps, Summary
from recurrent_bart.serving.docs_page import docs_page, without_validation_errors
from recurrent_bart.serving.model_worker import Job
from recurrent_bart.serving.requests import (
    GENERATION,
    NUMBER,
    POSITION,
    QUERY,
    WRITING,
    describe,
    no_options,
    read_body,
    read_options,
    read_query,
)
from recurrent_bart.serving.schemas import ErrorAnswer, Section, SectionsAnswer, SessionAnswer, SummaryAnswer
from recurrent_bart.serving.service import LONG_CHARACTERS, Service, read_long
from recurrent_bart.serving.sessions import OUT_OF_MEMORY, Opened

STATE_TYPE = "application/octet-stream"
STATE_SCHEMA = {"content": {STATE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
EVENTS = {"description": "Summary, or events with `stream`", "content": {"text/event-stream": {}}}
BLOCK_BYTES = 2**20
# shows the token in OpenAPI; `check_access` checks it
BEARER = HTTPBearer(auto_error=False, description="token that the service was started with, if any")


def add_monitoring(app: FastAPI, service: Service) -> None:
    """Add /health, /metrics, /docs and the description of all routes."""
    describe_all = app.openapi

    def openapi() -> dict[str, Any]:
        return without_validation_errors(describe_all())

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/health", responses=_errors(403, 503))
    def health() -> dict[str, str]:
        """Return `ok`, or 503 once the thread that runs the model has ended."""
        return {"status": "ok"}

    @app.get(
        "/metrics",
        dependencies=_guards(service),
        response_class=PlainTextResponse,
        responses=_errors(401, 403, 500, 503),
    )
    def metrics() -> PlainTextResponse:
        """Return counters in Prometheus' text format. They begin at 0 when the service starts."""
        gauges = {"sessions": service.sessions.count(), "pending": service.worker.n_pending}
        return PlainTextResponse(service.metrics.text(**gauges))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def add_summaries(app: FastAPI, service: Service) -> None:
    """Add POST /v1/summaries."""
    allowed, sessions = GENERATION + WRITING + QUERY, service.sessions

    @app.post(
        "/v1/summaries",
        dependencies=_guards(service),
        response_model=SummaryAnswer,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 403, 408, 413, 415, 500, 503)},
        openapi_extra=describe(allowed, has_text=True),
    )
    async def summarize(request: Request) -> Any:
        """Summarise a text: the body is the text, or JSON with `text` and options."""
        text, options = await service.text(request, allowed)
        text = with_line_feeds(text)
        if not text.strip():
            raise HTTPException(400, "the text is empty")
        is_long = len(text) > LONG_CHARACTERS

        def read(job: Job) -> Steps[tuple[ReadingSession, ReadText]]:
            session = service.open(options | job.criteria())
            yield from session.add_in_steps(text)
            return session, (yield from session.read_to_end())

        def stream(job: Job) -> Steps[Generator[str, None, Summary]]:
            session, found = yield from sessions.with_memory(lambda: read(job))
            return sessions.with_memory(lambda: session.stream_after(*found))

        if options.pop("stream", False):
            return service.stream(stream, is_long=is_long)
        summary = None
        if not is_long:
            # with texts that wait, and alone once more if memory is short
            with contextlib.suppress(*OUT_OF_MEMORY):
                summary = await service.result(request, Job(text=text, options=options))
        if summary is None:
            job = Job(lambda job: sessions.with_memory(lambda: read_long(service.open(options | job.criteria()), text)))
            job.is_long = is_long
            summary = await service.result(request, job)
        service.count(summary.n_tokens)
        return SummaryAnswer.of(summary)


def add_sessions(app: FastAPI, service: Service) -> None:
    """Add the routes of sessions."""
    sessions = service.sessions
    guarded = _guards(service)
    used = [*guarded, Depends(service.using)]
    has_none = Depends(no_options)

    @app.post(
        "/v1/sessions",
        dependencies=guarded,
        status_code=201,
        responses=_errors(400, 401, 403, 408, 413, 429, 500, 503),
        openapi_extra=describe(QUERY, has_object=True),
    )
    async def create(request: Request) -> SessionAnswer:
        """Begin a session, with a question about its whole text or without one."""
        query = await read_query(request, service.settings)
        id = await service.run(request, lambda _: sessions.create(query))
        return SessionAnswer(id=id, n_characters=0, n_read=0, n_sections=0)

    @app.get("/v1/sessions/{id}", dependencies=[*used, has_none], responses=_errors(400, 401, 403, 404, 413, 500, 503))
    async def show(id: str, request: Request) -> SessionAnswer:
        """Return the size of a session's text."""
        return _session(id, await service.run(request, lambda _: sessions.with_memory(lambda: sessions.find(id)), id))

    @app.post(
        "/v1/sessions/{id}/text",
        dependencies=used,
        responses=_errors(400, 401, 403, 404, 408, 409, 413, 415, 500, 503),
        openapi_extra=describe(POSITION, has_text=True),
    )
    async def add(id: str, request: Request) -> SessionAnswer:
        """Add a piece of text. With `position`, a piece may be sent again after an answer was lost."""
        text, options = await service.text(request, POSITION)
        is_long = len(text) > LONG_CHARACTERS

        def work(_: Job) -> Steps[Opened]:
            return sessions.with_memory(lambda: sessions.add(id, text, options.get("position")))

        return _session(id, await service.run(request, work, id, is_long))

    @app.post(
        "/v1/sessions/{id}/sections",
        dependencies=used,
        response_model=Section,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 403, 404, 409, 413, 500, 503)},
        openapi_extra=describe(GENERATION + WRITING + NUMBER),
    )
    async def end_section(id: str, request: Request) -> Any:
        """End a section, and return its summary. With `number`, it may be asked for again after an answer was lost."""
        options = read_options(request.query_params, GENERATION + WRITING + NUMBER, service.most_tokens)
        number, is_streamed = options.pop("number", None), options.pop("stream", False)
        end = sessions.stream_section if is_streamed else sessions.end_section

        def work(job: Job) -> Steps[Any]:
            return sessions.with_memory(lambda: end(id, number, service.change(options, job)))

        if is_streamed:
            return service.stream(work, id)
        section = await service.run(request, work, id)
        service.count(section.n_tokens)
        return section

    @app.get(
        "/v1/sessions/{id}/sections",
        dependencies=[*used, has_none],
        response_model_exclude_none=True,
        responses=_errors(400, 401, 403, 404, 413, 500, 503),
    )
    async def sections(id: str, request: Request) -> SectionsAnswer:
        """Return the last sections that have ended, with their summaries."""
        found = await service.run(request, lambda _: sessions.with_memory(lambda: sessions.find(id)), id)
        notes = found.notes
        return SectionsAnswer(id=id, n_sections=notes.n_sections, sections=notes.sections)

    @app.get(
        "/v1/sessions/{id}/summary",
        dependencies=used,
        response_model=SummaryAnswer,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 403, 404, 413, 500, 503)},
        openapi_extra=describe(GENERATION + WRITING),
    )
    async def summary(id: str, request: Request) -> Any:
        """Return the summary of the text so far."""
        options = read_options(request.query_params, GENERATION + WRITING, service.most_tokens)
        is_streamed = options.pop("stream", False)

        def reading(job: Job) -> ReadingSession:
            return service.change(options, job)(sessions.find(id).reading)

        def read(job: Job) -> Steps[tuple[ReadingSession, ReadText]]:
            session = reading(job)
            return session, (yield from session.read_to_end())

        def stream(job: Job) -> Steps[Generator[str, None, Summary]]:
            session, found = yield from sessions.with_memory(lambda: read(job))
            return sessions.with_memory(lambda: session.stream_after(*found))

        if is_streamed:
            return service.stream(stream, id)
        found = await service.run(
            request, lambda job: sessions.with_memory(lambda: reading(job).summary_in_steps()), id
        )
        service.count(found.n_tokens)
        return SummaryAnswer.of(found)

    @app.get(
        "/v1/sessions/{id}/state",
        dependencies=[*used, has_none],
        response_class=StreamingResponse,
        responses={200: STATE_SCHEMA, **_errors(400, 401, 403, 404, 500, 503)},
    )
    async def state(id: str, request: Request) -> StreamingResponse:
        """Return the state as a safetensors file, which PUT takes."""
        file, n_bytes = await service.run(request, lambda _: sessions.state(id), id)
        return StreamingResponse(_blocks(file), media_type=STATE_TYPE, headers={"Content-Length": str(n_bytes)})

    @app.put(
        "/v1/sessions/{id}/state",
        dependencies=[*used, has_none],
        responses=_errors(400, 401, 403, 404, 408, 413, 500, 503),
        openapi_extra={"requestBody": {"required": True, **STATE_SCHEMA}},
    )
    async def put_state(id: str, request: Request) -> SessionAnswer:
        """Continue from a state that this service, or the command line, saved with the same model."""
        body = await read_body(request, service.settings.state_bytes, service.settings.body_seconds)
        opened = await service.run(request, lambda _: sessions.with_memory(lambda: sessions.replace(id, body)), id)
        return _session(id, opened)

    @app.delete(
        "/v1/sessions/{id}",
        dependencies=[*used, has_none],
        status_code=204,
        responses=_errors(400, 401, 403, 404, 500, 503),
    )
    async def delete(id: str, request: Request) -> Response:
        """Delete a session."""
        await service.run(request, lambda _: sessions.delete(id), id)
        return Response(status_code=204)


def _guards(service: Service) -> list[Any]:
    return [Depends(BEARER), Depends(service.check_access)]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def _session(id: str, opened: Opened) -> SessionAnswer:
    notes = opened.notes
    n_read = opened.reading.n_characters
    return SessionAnswer(id=id, n_characters=notes.n_characters, n_read=n_read, n_sections=notes.n_sections)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK_BYTES):
            yield block
