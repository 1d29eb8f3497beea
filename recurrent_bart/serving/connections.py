"""Connections of the service: their number is limited, and a client that does nothing is disconnected."""

import asyncio
import resource
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# most connections; fewer if the process may open few files
MOST_CONNECTIONS = 4096
# bytes after which the head of a request, or the fields after its body, must have ended
HEAD_BYTES = 2**16
# connections that the system holds until they are accepted
N_QUEUED = 1024
# requests that a client may send before the first one is answered
N_PIPELINED = 8


class Connections:
    """Limits of all connections.

    Attributes:
        most: Most open connections. A further one closes the connection that is idle longest.
        seconds: Most seconds that a client may take to send the head of a request, or to read a part of its answer.
        backlog: Connections that are accepted at once; `most` does not count them yet.
    """

    def __init__(self, seconds: float):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        n_files = 2 * MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(soft, 2 * MOST_CONNECTIONS)
        # an answer may need a file too
        self.seconds, self.most, self.backlog = seconds, max(n_files // 2, 1), max(n_files // 16, 1)
        self.idle: dict[Connection, None] = {}

    def protocol(self, **given: Any) -> "Connection":
        """Return the protocol of a new connection."""
        return Connection(self, **given)


class Server(uvicorn.Server):
    """Server that accepts few connections at once, while many wait in the system's queue."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets=sockets)
        for listening in sockets or []:
            # the event loop took the number of connections that it accepts at once for the queue too
            listening.listen(N_QUEUED)


class Connection(HttpToolsProtocol):
    """Connection with limits. It is idle while it waits for the head of a request."""

    def __init__(self, limits: Connections, **given: Any):
        super().__init__(**given)
        self.limits, self.n_head_bytes = limits, 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request. Close the connection that is idle longest if there are too many."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.limits.most:
            next(iter(self.limits.idle))._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """End all limits of time."""
        self.limits.idle.pop(self, None)
        for name in list(self._timers):
            self._stop_timer(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes. Close a connection whose head, or whose fields after a body, have no end."""
        if self.n_head_bytes > HEAD_BYTES:
            self._drop()
            return
        # the parser's calls of `on_...` begin to count anew
        self.n_head_bytes += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self.n_head_bytes = 0
        if len(self.pipeline) >= N_PIPELINED:
            raise ValueError("too many requests before an answer")
        self.limits.idle.pop(self, None)
        self._stop_timer("head")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self.n_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self.n_head_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, or for the client to read the rest of the answer."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._wait_for_head()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._start_timer("write")

    def resume_writing(self) -> None:
        """Go on with an answer."""
        super().resume_writing()
        self._stop_timer("write")

    def _wait_for_head(self) -> None:
        self.limits.idle[self] = None
        self._start_timer("head")

    def _start_timer(self, name: str) -> None:
        self._stop_timer(name)
        self._timers[name] = self.loop.call_later(self.limits.seconds, self._drop)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _drop(self) -> None:
        """Close the connection at once, though the client has not read all of an answer."""
        self.limits.idle.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()
