"""HTTP interface of the service. No text of a user is logged, and no error tells a path or a text."""

import asyncio
import copy
import functools
import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from recurrent_bart.inference.reading_session import ReadingSession, Summary
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.metrics import Metrics
from recurrent_bart.serving.model_worker import Busy, ModelWorker, with_options
from recurrent_bart.serving.page import add_page
from recurrent_bart.serving.requests import read_body, read_object, read_options, read_text
from recurrent_bart.serving.sessions import Gap, NoSession, Sessions, TooManySessions
from recurrent_bart.serving.settings import Settings

STATE_TYPE = "application/octet-stream"
# status and text of each expected error; None: the error's own text
STATUSES: dict[type[Exception], tuple[int, str | None]] = {
    NoSession: (404, "no such session; it may have ended after its time to live"),
    TooManySessions: (429, "too many sessions; delete one, or come again later"),
    Busy: (503, "too many requests are waiting; come again later"),
    Gap: (409, None),
    ValueError: (400, None),
}


class Service:
    """Model, sessions and counters behind the HTTP interface."""

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.sessions = Sessions(summarizer, settings)
        self.worker = ModelWorker(summarizer, settings)
        self.summarizer = summarizer
        self.most_tokens = summarizer.model.config.max_position_embeddings

    def close(self) -> None:
        """Finish the waiting requests."""
        self.worker.close()
        self.sessions.close()

    async def call(self, work: Callable[[], Any]) -> Any:
        """Call a function in the model's thread."""
        return await asyncio.wrap_future(self.worker.call(work))

    async def body(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Return the text of a request and its options."""
        body = await read_body(request, self.settings.text_bytes, self.settings.body_seconds)
        return read_text(request, body, self.most_tokens)

    def check_access(self, request: Request) -> None:
        """Refuse a wrong token, and a page of another site that a browser on this host shows."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "requests of other sites are refused")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.settings.token and not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def events(self, pieces: Callable[[], Generator[str, None, Summary]]) -> AsyncIterator[str]:
        """Return server-sent events: `text` for each piece of a summary, at last `end` with the whole summary.

        A full queue raises here, before the answer begins.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        summaries: list[Summary] = []

        def generate() -> None:
            try:
                for piece in with_summary(pieces(), summaries):
                    loop.call_soon_threadsafe(queue.put_nowait, piece)
            finally:
                loop.call_soon_threadsafe(queue.put_nowait, None)

        return self._relay(queue, self.worker.call(generate), summaries)

    async def _relay(
        self, queue: "asyncio.Queue[str | None]", done: Future[None], summaries: list[Summary]
    ) -> AsyncIterator[str]:
        whole = ""
        while (piece := await queue.get()) is not None:
            whole += piece
            yield f"event: text\ndata: {json.dumps({'text': piece})}\n\n"
        try:
            await asyncio.wrap_future(done)
            content = {"summary": whole}
            if summaries and summaries[0].citations is not None:
                content["citations"] = summaries[0].record()["citations"]
            yield f"event: end\ndata: {json.dumps(content)}\n\n"
        except Exception as error:
            yield f"event: error\ndata: {json.dumps({'detail': _detail(error, 'stream')})}\n\n"


def with_summary(pieces: Generator[str, None, Summary], summaries: list[Summary]) -> Iterator[str]:
    """Yield the pieces of a summary, then append the summary that their generator returns."""
    summaries.append((yield from pieces))


def build_app(summarizer: Summarizer, settings: Settings) -> FastAPI:
    """Build the application. It owns the folder of sessions until it ends."""
    service = Service(summarizer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Recurrent BART", lifespan=lifespan)
    app.state.service = service
    add_errors(app)
    add_counting(app, service.metrics)
    add_page(app)
    add_monitoring(app, service)
    add_summaries(app, service)
    add_sessions(app, service)
    return app


def add_errors(app: FastAPI) -> None:
    """Give each expected error its status. An unexpected one is logged by its type only."""
    for kind, (status, text) in STATUSES.items():

        def answer(_: Request, error: Exception, status: int = status, text: str | None = text) -> JSONResponse:
            headers = {"Retry-After": "5"} if status in (429, 503) else None
            return JSONResponse({"detail": text or str(error)}, status, headers)

        app.add_exception_handler(kind, answer)


def add_counting(app: FastAPI, metrics: Metrics) -> None:
    """Count requests and their seconds by route, and turn faults into status 500."""

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begin = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception as error:
            response = JSONResponse({"detail": _detail(error, "request")}, 500)
        route = getattr(request.scope.get("route"), "path", "unknown")
        metrics.add("requests_total", route=route, status=response.status_code)
        metrics.add("request_seconds_sum", time.perf_counter() - begin, route=route)
        metrics.add("request_seconds_count", route=route)
        return response


def add_monitoring(app: FastAPI, service: Service) -> None:
    """Add /health and /metrics."""

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(service.check_access)])
    def metrics() -> PlainTextResponse:
        gauges = {"sessions": service.sessions.count(), "waiting": service.worker.n_waiting}
        return PlainTextResponse(service.metrics.text(**gauges))


def add_summaries(app: FastAPI, service: Service) -> None:
    """Add POST /v1/summaries."""

    @app.post("/v1/summaries", dependencies=[Depends(service.check_access)])
    async def summarize(request: Request) -> Response:
        """Summarise a text: the body is the text, or JSON with `text` and options.

        `stream` gives events, `citations` the passages of the source.
        """
        text, options = await service.body(request)
        if not text.strip():
            raise HTTPException(400, "the text is empty")
        if options.pop("stream", False):
            summarizer = with_options(service.summarizer, options)
            return _event_stream(service, lambda: summarizer.stream(text))
        summary = await asyncio.wrap_future(service.worker.summarize(text, options))
        return _answer(service, summary)


def add_sessions(app: FastAPI, service: Service) -> None:
    """Add the routes of sessions."""
    guarded, sessions = [Depends(service.check_access)], service.sessions

    @app.post("/v1/sessions", dependencies=guarded, status_code=201)
    async def create(request: Request) -> dict[str, Any]:
        """Begin a session; `query`, in the URL or in a JSON body, is a question about its text."""
        body = await read_body(request, service.settings.text_bytes, service.settings.body_seconds)
        given = {**request.query_params, **(read_object(body) if body.strip() else {})}
        if given.keys() - {"query"}:
            raise HTTPException(400, "unknown option; the only option of a new session is query")
        query = read_options(given, service.most_tokens).get("query")
        return {"id": await service.call(lambda: sessions.create(query)), "n_characters": 0}

    @app.get("/v1/sessions/{id}", dependencies=guarded)
    async def show(id: str) -> dict[str, Any]:
        return {"id": id, "n_characters": (await service.call(lambda: sessions.find(id))).n_characters}

    @app.post("/v1/sessions/{id}/text", dependencies=guarded)
    async def add(id: str, request: Request) -> dict[str, Any]:
        """Add a piece of text. With `position`, the characters sent before, a piece may be sent again."""
        text, options = await service.body(request)
        refuse_query(options)
        position = options.get("position")
        return {"id": id, "n_characters": await service.call(lambda: sessions.add(id, text, position))}

    @app.post("/v1/sessions/{id}/sections", dependencies=guarded)
    async def end_section(id: str, request: Request) -> Response:
        """End a section, and return its summary; `stream` gives events, `citations` the passages of the source."""
        options = read_options(request.query_params, service.most_tokens)
        refuse_query(options)
        is_streamed = options.pop("stream", False)
        change = functools.partial(with_generation, summarizer=service.summarizer, options=options)
        if is_streamed:
            await service.call(lambda: sessions.find(id))
            return _event_stream(service, lambda: sessions.stream_section(id, change))
        return _answer(service, await service.call(lambda: sessions.end_section(id, change)))

    @app.get("/v1/sessions/{id}/summary", dependencies=guarded)
    async def summary(id: str, request: Request) -> Response:
        """Return the summary of the text so far; `stream` gives events, `citations` the passages of the source."""
        options = read_options(request.query_params, service.most_tokens)
        is_streamed = options.pop("stream", False)
        refuse_query(options)

        def reading() -> ReadingSession:
            return with_generation(sessions.find(id).reading, service.summarizer, options)

        if is_streamed:
            await service.call(lambda: sessions.find(id))
            return _event_stream(service, lambda: reading().stream())
        return _answer(service, await service.call(lambda: reading().summary()))

    @app.get("/v1/sessions/{id}/state", dependencies=guarded)
    async def state(id: str) -> Response:
        """Return the state as a safetensors file."""
        return Response(await service.call(lambda: sessions.state(id)), media_type=STATE_TYPE)

    @app.put("/v1/sessions/{id}/state", dependencies=guarded)
    async def put_state(id: str, request: Request) -> dict[str, Any]:
        """Continue from a state that this service, or the command line, saved with the same model."""
        await service.call(lambda: sessions.find(id))
        body = await read_body(request, service.settings.state_bytes, service.settings.body_seconds)
        return {"id": id, "n_characters": await service.call(lambda: sessions.replace(id, body))}

    @app.delete("/v1/sessions/{id}", dependencies=guarded, status_code=204)
    async def delete(id: str) -> Response:
        await service.call(lambda: sessions.delete(id))
        return Response(status_code=204)


def refuse_query(options: Mapping[str, Any]) -> None:
    """Refuse a question about a session that has begun, with status 400."""
    if "query" in options:
        raise HTTPException(400, "a session has the query that it began with: POST /v1/sessions?query=...")


def with_generation(reading: ReadingSession, summarizer: Summarizer, options: dict[str, Any]) -> ReadingSession:
    """Return the session with other settings, as `with_options` gives them. Both have the same text."""
    changed, settings = copy.copy(reading), with_options(summarizer, options)
    changed.generation, changed.citations = settings.generation, settings.citations
    return changed


def _detail(error: Exception, place: str) -> str:
    """Return what a client learns of an error. A fault's type is logged; its message may hold text of a client."""
    for kind, (_, text) in STATUSES.items():
        if isinstance(error, kind):
            return text or str(error)
    print(f"fault in a {place}: {type(error).__name__}", file=sys.stderr, flush=True)
    return "a fault of the service"


def _answer(service: Service, summary: Summary) -> JSONResponse:
    service.metrics.add("summaries_total")
    service.metrics.add("tokens_total", summary.n_tokens)
    return JSONResponse(summary.record())


def _event_stream(service: Service, pieces: Callable[[], Generator[str, None, Summary]]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(service.events(pieces), media_type="text/event-stream", headers=headers)
