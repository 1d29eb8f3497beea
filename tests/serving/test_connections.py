"""Limits of connections: clients that do nothing, heads without an end, and more connections than files."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
import uvicorn
from starlette.responses import PlainTextResponse, StreamingResponse

from recurrent_bart.serving.connections import Connections

SECONDS = 0.6
HEAD = b"POST /read HTTP/1.1\r\nHost: localhost\r\n"


class Service:
    """Started server of a small application, which notes its begun and ended answers.

    `/sleep` answers after a while, `/endless` never ends its answer, `/read` reads the body.
    """

    def __init__(self):
        self.begun, self.ended = [], []
        self.connections = Connections(SECONDS)
        self.listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self.answer, http=self.connections.protocol, log_level="error", lifespan="off", interface="asgi3"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})
        self.thread.start()

    async def answer(self, scope, receive, send):
        self.begun.append(scope["path"])
        try:
            response = StreamingResponse(self.blocks()) if scope["path"] == "/endless" else PlainTextResponse("done")
            if scope["path"] == "/sleep":
                await asyncio.sleep(3 * SECONDS)
            while scope["path"] == "/read" and (await receive()).get("more_body"):
                pass
            await response(scope, receive, send)
        finally:
            self.ended.append(scope["path"])

    async def blocks(self):
        while True:
            yield b"x" * 2**20
            await asyncio.sleep(0)

    def connect(self, sent=b""):
        connection = socket.create_connection(self.listening.getsockname(), timeout=20)
        connection.sendall(sent)
        return connection


@pytest.fixture
def service():
    started = Service()
    yield started
    started.server.should_exit = started.server.force_exit = True
    started.thread.join(20)
    assert not started.thread.is_alive()


def received(connection):
    """Return all bytes until the service closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            found += part
    return found


def seconds_until_closed(connection, drip=b""):
    """Return the seconds until the service closes the connection. Meanwhile, send these bytes again and again."""
    begin = time.monotonic()
    connection.settimeout(0.1)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - begin < 20:
            if drip:
                connection.sendall(drip)
            with contextlib.suppress(TimeoutError):
                if not connection.recv(2**16):
                    break
    return time.monotonic() - begin


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nX: ", b""),
        (b"GET / HTTP/1.1\r\nX: ", b"x"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", b"x"),
    ],
    ids=["nothing", "silent", "slow", "after an answer", "slow after an answer"],
)
def test_a_client_that_sends_no_whole_head_is_disconnected(service, sent, drip):
    assert SECONDS / 2 < seconds_until_closed(service.connect(sent), drip) < 4 * SECONDS
    assert service.connections.idle == {}


def test_a_client_that_does_not_read_is_disconnected_and_its_answer_ends(service):
    connection = service.connect(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    end = time.monotonic() + 20
    while not service.ended:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert received(connection)


def test_a_client_that_reads_slowly_or_waits_long_gets_its_answer(service):
    waiting = service.connect(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    slow = service.connect(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
    begin = time.monotonic()
    while time.monotonic() - begin < 3 * SECONDS:
        for _ in range(100):
            assert slow.recv(2**16)
        time.sleep(SECONDS / 6)
    assert not service.ended.count("/endless")
    assert received(waiting).endswith(b"done")


def send_until_closed(connection, part, most):
    """Send a part again and again. Return the number of bytes until the service closes the connection."""
    for n_bytes in range(0, most, len(part)):
        try:
            connection.sendall(part)
        except ConnectionError:
            return n_bytes
    return most


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"x" * 1000),
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 100),
        (b"GET /", b"x" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 100),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1", b";x=y" * 100),
        (b"", b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20),
    ],
    ids=["field", "fields", "path", "trailer", "extension", "pipeline"],
)
def test_a_head_has_a_largest_size(service, head, part):
    connection = service.connect(head)
    # the buffers of the network hold a few MiB
    assert send_until_closed(connection, part, most=2**25) < 2**25
    assert len(service.begun) <= 10


def test_a_body_in_small_chunks_is_read(service):
    connection = service.connect(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"1\r\nx\r\n" * 1000)
    connection.sendall(b"0\r\n\r\n")
    assert received(connection).endswith(b"done")


def test_a_further_connection_closes_the_one_that_is_idle_longest(service):
    service.connections.most = 4
    request = b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    busy = [service.connect(request % b"sleep") for _ in range(2)]
    while len(service.begun) < 2:
        time.sleep(0.01)
    idle = [service.connect() for _ in range(6)]
    assert received(service.connect(request % b"now")).endswith(b"done")
    assert all(seconds_until_closed(connection) < SECONDS / 2 for connection in idle[:4])
    more = [service.connect(request % b"sleep") for _ in range(2)]
    while len(service.begun) < 5:
        time.sleep(0.01)
    # all are busy
    assert received(service.connect()) == b""
    assert all(received(connection).endswith(b"done") for connection in (*busy, *more))
