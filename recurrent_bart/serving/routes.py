"""Routes of the service: monitoring and documentation, summaries, sessions."""

from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse

from recurrent_bart.data.text_files import with_line_feeds
from recurrent_bart.inference.reading_session import ReadingSession, Steps, Summary
from recurrent_bart.serving.docs_page import docs_page
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
from recurrent_bart.serving.sessions import Opened

STATE_TYPE = "application/octet-stream"
STATE_SCHEMA = {"content": {STATE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
EVENTS = {"description": "Summary, or events with `stream`", "content": {"text/event-stream": {}}}
BLOCK_BYTES = 2**20


def add_monitoring(app: FastAPI, service: Service) -> None:
    """Add /health, /metrics and /docs."""

    @app.get("/health")
    def health() -> dict[str, str]:
        """Return `ok`."""
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(service.check_access)], response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Return counters in Prometheus' text format. They begin at 0 when the service starts."""
        gauges = {"sessions": service.sessions.count(), "pending": service.worker.n_pending}
        return PlainTextResponse(service.metrics.text(**gauges))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def add_summaries(app: FastAPI, service: Service) -> None:
    """Add POST /v1/summaries."""
    allowed = GENERATION + WRITING + QUERY

    @app.post(
        "/v1/summaries",
        dependencies=[Depends(service.check_access)],
        response_model=SummaryAnswer,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 408, 413, 415, 503)},
        openapi_extra=describe(allowed, has_text=True),
    )
    async def summarize(request: Request) -> Any:
        """Summarise a text: the body is the text, or JSON with `text` and options."""
        text, options = await service.text(request, allowed)
        text = with_line_feeds(text)
        if not text.strip():
            raise HTTPException(400, "the text is empty")
        is_long = len(text) > LONG_CHARACTERS

        def stream(job: Job) -> Steps[Generator[str, None, Summary]]:
            session = service.open(options | job.criteria())
            yield from session.add_in_steps(text)
            return session.stream_after(*(yield from session.read_to_end()))

        if options.pop("stream", False):
            return service.stream(stream, is_long=is_long)
        if is_long:
            job = Job(lambda job: read_long(service.open(options | job.criteria()), text), is_long=True)
        else:
            job = Job(text=text, options=options)
        summary = await service.result(request, job)
        service.count(summary.n_tokens)
        return SummaryAnswer.of(summary)


def add_sessions(app: FastAPI, service: Service) -> None:
    """Add the routes of sessions."""
    sessions = service.sessions
    guarded = [Depends(service.check_access)]
    used = [*guarded, Depends(service.using)]
    has_none = Depends(no_options)

    @app.post(
        "/v1/sessions",
        dependencies=guarded,
        status_code=201,
        responses=_errors(400, 401, 408, 413, 429, 503),
        openapi_extra=describe(QUERY, has_object=True),
    )
    async def create(request: Request) -> SessionAnswer:
        """Begin a session, with a question about its whole text or without one."""
        query = await read_query(request, service.settings)
        id = await service.run(request, lambda _: sessions.create(query))
        return SessionAnswer(id=id, n_characters=0, n_sections=0)

    @app.get("/v1/sessions/{id}", dependencies=[*used, has_none], responses=_errors(401, 404, 503))
    async def show(id: str, request: Request) -> SessionAnswer:
        """Return the size of a session's text."""
        return _session(id, await service.run(request, lambda _: sessions.find(id), id))

    @app.post(
        "/v1/sessions/{id}/text",
        dependencies=used,
        responses=_errors(400, 401, 404, 408, 409, 413, 415, 503),
        openapi_extra=describe(POSITION, has_text=True),
    )
    async def add(id: str, request: Request) -> SessionAnswer:
        """Add a piece of text. With `position`, a piece may be sent again after an answer was lost."""
        text, options = await service.text(request, POSITION)
        is_long = len(text) > LONG_CHARACTERS
        opened = await service.run(request, lambda _: sessions.add(id, text, options.get("position")), id, is_long)
        return _session(id, opened)

    @app.post(
        "/v1/sessions/{id}/sections",
        dependencies=used,
        response_model=Section,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 404, 409, 413, 503)},
        openapi_extra=describe(GENERATION + WRITING + NUMBER),
    )
    async def end_section(id: str, request: Request) -> Any:
        """End a section, and return its summary. With `number`, it may be asked for again after an answer was lost."""
        options = read_options(request.query_params, GENERATION + WRITING + NUMBER, service.most_tokens)
        number, is_streamed = options.pop("number", None), options.pop("stream", False)
        if is_streamed:
            return service.stream(lambda job: sessions.stream_section(id, number, service.change(options, job)), id)
        section = await service.run(
            request, lambda job: sessions.end_section(id, number, service.change(options, job)), id
        )
        service.count(section.n_tokens)
        return section

    @app.get(
        "/v1/sessions/{id}/sections",
        dependencies=[*used, has_none],
        response_model_exclude_none=True,
        responses=_errors(401, 404, 503),
    )
    async def sections(id: str, request: Request) -> SectionsAnswer:
        """Return the last sections that have ended, with their summaries."""
        notes = (await service.run(request, lambda _: sessions.find(id), id)).notes
        return SectionsAnswer(id=id, n_sections=notes.n_sections, sections=notes.sections)

    @app.get(
        "/v1/sessions/{id}/summary",
        dependencies=used,
        response_model=SummaryAnswer,
        response_model_exclude_none=True,
        responses={200: EVENTS, **_errors(400, 401, 404, 503)},
        openapi_extra=describe(GENERATION + WRITING),
    )
    async def summary(id: str, request: Request) -> Any:
        """Return the summary of the text so far."""
        options = read_options(request.query_params, GENERATION + WRITING, service.most_tokens)
        is_streamed = options.pop("stream", False)

        def reading(job: Job) -> ReadingSession:
            return service.change(options, job)(sessions.find(id).reading)

        def stream(job: Job) -> Steps[Generator[str, None, Summary]]:
            session = reading(job)
            return session.stream_after(*(yield from session.read_to_end()))

        if is_streamed:
            return service.stream(stream, id)
        found = await service.run(request, lambda job: reading(job).summary_in_steps(), id)
        service.count(found.n_tokens)
        return SummaryAnswer.of(found)

    @app.get(
        "/v1/sessions/{id}/state",
        dependencies=[*used, has_none],
        response_class=StreamingResponse,
        responses={200: STATE_SCHEMA, **_errors(401, 404, 503)},
    )
    async def state(id: str, request: Request) -> StreamingResponse:
        """Return the state as a safetensors file, which PUT takes."""
        file, n_bytes = await service.run(request, lambda _: sessions.state(id), id)
        return StreamingResponse(_blocks(file), media_type=STATE_TYPE, headers={"Content-Length": str(n_bytes)})

    @app.put(
        "/v1/sessions/{id}/state",
        dependencies=[*used, has_none],
        responses=_errors(400, 401, 404, 408, 413, 503),
        openapi_extra={"requestBody": {"required": True, **STATE_SCHEMA}},
    )
    async def put_state(id: str, request: Request) -> SessionAnswer:
        """Continue from a state that this service, or the command line, saved with the same model."""
        body = await read_body(request, service.settings.state_bytes, service.settings.body_seconds)
        return _session(id, await service.run(request, lambda _: sessions.replace(id, body), id))

    @app.delete("/v1/sessions/{id}", dependencies=[*used, has_none], status_code=204, responses=_errors(401, 404, 503))
    async def delete(id: str, request: Request) -> Response:
        """Delete a session."""
        await service.run(request, lambda _: sessions.delete(id), id)
        return Response(status_code=204)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


def _session(id: str, opened: Opened) -> SessionAnswer:
    notes = opened.notes
    return SessionAnswer(id=id, n_characters=notes.n_characters, n_sections=notes.n_sections)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK_BYTES):
            yield block
