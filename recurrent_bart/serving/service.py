"""Work that the routes of the service share: reading requests, asking the model, streams, access."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from recurrent_bart.inference.reading_session import ReadingSession, Steps, Summary
from recurrent_bart.inference.stream_reader import BLOCK
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.errors import detail_of
from recurrent_bart.serving.metrics import Metrics
from recurrent_bart.serving.model_worker import Job, ModelWorker, Stopped, with_options
from recurrent_bart.serving.requests import BodyMemory, read_text
from recurrent_bart.serving.schemas import Section, SummaryAnswer
from recurrent_bart.serving.sessions import Change, Sessions
from recurrent_bart.serving.settings import Settings

# characters above which a text is read in steps, alone; shorter texts are read together
LONG_CHARACTERS = BLOCK
# most seconds between two deletions of old sessions
DELETE_EVERY_SECONDS = 60.0
# work of a stream: its steps return the pieces of the summary, and the pieces return the whole summary
StreamWork = Callable[[Job], Steps[Generator[str, None, Summary | Section]]]


class Service:
    """Model, sessions and counters behind the HTTP interface."""

    def __init__(self, summarizer: Summarizer, settings: Settings):
        self.settings, self.summarizer, self.metrics = settings, summarizer, Metrics()
        self.bodies = BodyMemory(settings.bodies_bytes)
        self.sessions = Sessions(summarizer, settings)
        self.worker = ModelWorker(summarizer, settings)
        self.most_tokens = summarizer.model.config.max_position_embeddings

    def close(self) -> None:
        """Finish the waiting requests."""
        self.worker.close()
        self.sessions.close()

    async def delete_old_sessions(self) -> None:
        """Delete sessions after their time to live, again and again."""
        while True:
            await asyncio.sleep(min(DELETE_EVERY_SECONDS, self.settings.session_seconds))
            job = self.worker.add(Job(lambda _: self.sessions.delete_old()), is_limited=False)
            try:
                await asyncio.wrap_future(job.result)
            except Exception as error:
                detail_of(error, "deletion of old sessions")

    async def text(self, request: Request, allowed: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        """Return the text of a request and its options."""
        return await read_text(request, self.settings, allowed, self.most_tokens)

    async def using(self, id: str) -> AsyncIterator[None]:
        """Keep a session until the request is answered."""
        with self.sessions.using(id):
            yield

    async def run(
        self, request: Request, work: Callable[..., Any], id: str | None = None, is_long: bool = False
    ) -> Any:
        """Let the model's thread call `work` with its job. Requests with the same session keep their order."""
        return await self.result(request, Job(work, key=id, is_long=is_long))

    async def result(self, request: Request, job: Job) -> Any:
        """Return the result of a job, which ends early if the client goes away."""
        self.worker.add(job)
        answer = asyncio.ensure_future(asyncio.wrap_future(job.result))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()
            job.stop()

    def check_access(self, request: Request) -> None:
        """Refuse a wrong token, and a page of another site that a browser on this host shows."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "requests of other sites are refused")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.settings.token and not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise HTTPException(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def open(self, options: dict[str, Any]) -> ReadingSession:
        """Return a session that reads a text in steps."""
        return with_options(self.summarizer, options).open(self.settings.step_segments)

    def change(self, options: dict[str, Any], job: Job) -> Change:
        """Return a function that sets how a session writes its summaries. The text stays the same."""
        generation = {name: value for name, value in options.items() if name != "citations"}
        return lambda reading: reading.with_generation(generation | job.criteria(), options.get("citations"))

    def count(self, n_tokens: int) -> None:
        """Count a summary of a text with this number of tokens."""
        self.metrics.add("summaries_total")
        self.metrics.add("summary_source_tokens_total", n_tokens)

    def stream(self, work: StreamWork, id: str | None = None, is_long: bool = False) -> StreamingResponse:
        """Return server-sent events: `text` for each piece of a summary, at last `end` with the whole summary.

        A full queue raises here, before the answer begins.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def generate(job: Job) -> Steps[SummaryAnswer]:
            pieces = yield from work(job)
            found = put_pieces(pieces, job, lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece))
            return SummaryAnswer.of(found) if isinstance(found, Summary) else found

        job = self.worker.add(Job(generate, key=id, is_long=is_long))
        # a job that never begins ends the events too
        job.result.add_done_callback(lambda _: loop.call_soon_threadsafe(queue.put_nowait, None))
        return EventStream(job, self._relay(queue, job))

    async def _relay(self, queue: "asyncio.Queue[str | None]", job: Job) -> AsyncIterator[str]:
        whole = ""
        while (piece := await queue.get()) is not None:
            whole += piece
            yield f"event: text\ndata: {json.dumps({'text': piece})}\n\n"
        try:
            answer = await asyncio.wrap_future(job.result)
            self.count(answer.n_tokens)
            content = answer.model_dump(include={"citations"}, exclude_none=True)
            yield f"event: end\ndata: {json.dumps({'summary': whole, **content})}\n\n"
        except Exception as error:
            yield f"event: error\ndata: {json.dumps({'detail': detail_of(error, 'stream')})}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of a job, which ends early if the client goes away."""

    def __init__(self, job: Job, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.stop()


def put_pieces(
    pieces: Generator[str, None, Summary | Section], job: Job, put: Callable[[str], object]
) -> Summary | Section:
    """Call `put` with each piece, and return the summary. End the pieces if the job's client is gone."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        if job.is_stopped:
            pieces.close()
            raise Stopped
        if piece:
            put(piece)


def read_long(session: ReadingSession, text: str) -> Steps[Summary]:
    """Read a text in steps, and return its summary."""
    yield from session.add_in_steps(text)
    return (yield from session.summary_in_steps())


async def _disconnected(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
