"""Bodies of requests: their memory, answers before their end, and other requests while they are read."""

import asyncio
import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.serving import service
from summaries import WORDS

TEXT = " ".join(WORDS[:40])


async def ask(client, method, path, parts=(b"",), go=None, headers=()):
    """Send a request. With `go`, the body has no end, and the client leaves once this event is set.

    Returns:
        status, headers and body of the answer.
    """
    rest, messages = list(parts), []

    async def receive():
        if rest:
            return {"type": "http.request", "body": rest.pop(0), "more_body": bool(rest) or go is not None}
        await (go.wait() if go else asyncio.sleep(60))
        return {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"testserver"), *headers],
    }
    await client.app(scope, receive, send)
    answer = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return messages[0]["status"], answer, b"".join(message["body"] for message in messages[1:])


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_the_bodies_of_all_requests_have_a_limited_size(serve, method):
    client = serve(bodies_bytes=200_000)
    id = client.post("/v1/sessions").json()["id"]
    path = "/v1/summaries" if method == "POST" else f"/v1/sessions/{id}/state"
    text = b"the text".ljust(50_000)

    async def run():
        go = asyncio.Event()
        held = [asyncio.create_task(ask(client, method, path, [b"x" * 90_000], go)) for _ in range(2)]
        await asyncio.sleep(0.1)
        status, headers, body = await ask(client, "POST", "/v1/summaries", [text])
        assert (status, headers["retry-after"]) == (503, "5")
        assert "large bodies" in json.loads(body)["detail"]
        assert (await ask(client, "POST", "/v1/summaries", [b"the text"]))[0] == 200
        assert not any(task.done() for task in held)
        go.set()
        assert [answer[0] for answer in await asyncio.gather(*held)] == [499, 499]
        # a request that was answered holds no memory
        for _ in range(5):
            assert (await ask(client, "POST", "/v1/summaries", [text]))[0] == 200

    asyncio.run(run())


def test_an_answer_before_the_end_of_the_body_closes_the_connection(serve):
    client, chunked = serve(token="secret", text_bytes=100), (b"transfer-encoding", b"chunked")
    access = (b"authorization", b"Bearer secret")

    async def run():
        for path, headers, status in (
            ("/v1/summaries", [chunked], 401),
            ("/v1/summaries", [(b"content-length", b"50")], 401),
            ("/v1/summaries", [access, chunked], 413),
            ("/v1/summaries", [access, (b"content-length", b"101")], 413),
            ("/nothing", [chunked], 404),
            ("/health", [chunked], 405),
        ):
            found, answer, _ = await ask(client, "POST", path, [b"x" * 60, b"x" * 60], asyncio.Event(), headers)
            assert (found, answer.get("connection")) == (status, "close"), path
        # a body that was read, or no body, leaves the connection open
        for method, path, headers, status in (
            ("POST", "/v1/summaries", [access, chunked], 200),
            ("POST", "/v1/summaries", [access, (b"content-type", b"multipart/form-data"), chunked], 415),
            ("POST", "/v1/sessions", [], 401),
            ("POST", "/v1/sessions", [(b"content-length", b"0")], 401),
            ("GET", "/health", [], 200),
        ):
            found, answer, _ = await ask(client, method, path, [b"the text"], None, headers)
            assert (found, "connection" in answer) == (status, False), path

    asyncio.run(run())


def test_health_is_bad_and_nobody_waits_once_the_models_thread_has_ended(serve, monkeypatch):
    client, go = serve(), threading.Event()
    worker = client.app.state.service.worker
    worker.add(service.Job(lambda _: go.wait(60)))
    while worker._short:
        time.sleep(0.01)
    # a fault of the thread itself
    monkeypatch.setattr(worker, "_drop_stopped", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    answers = []
    paths = ["/v1/summaries", "/v1/summaries?stream=true"]
    waiting = [
        threading.Thread(target=lambda path=path: answers.append(client.post(path, content=TEXT))) for path in paths
    ]
    for thread in waiting:
        thread.start()
    while worker.n_pending < 3:
        time.sleep(0.01)
    assert client.get("/health").json() == {"status": "ok"}
    go.set()
    for thread in waiting:
        thread.join(20)
    assert sorted((answer.status_code, "a fault of the service" in answer.text) for answer in answers) == [
        (200, True),
        (500, True),
    ]
    worker._thread.join(20)
    health, more = client.get("/health"), client.post("/v1/summaries", content=TEXT)
    assert (health.status_code, more.status_code) == (503, 503)
    assert "thread has ended" in health.json()["detail"]


async def longest_pause(work):
    """Return the result of `work`, and the most seconds in which the event loop did nothing else."""
    task, pauses = asyncio.create_task(work), []
    while not task.done():
        begin = time.monotonic()
        await asyncio.sleep(0.001)
        pauses.append(time.monotonic() - begin)
    return await task, max(pauses)


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_large_text_does_not_hold_up_other_requests(serve, kind, letter):
    client = serve(text_characters=2**21)
    letters = letter * (2**23 // len(letter.encode()) - 20)
    body = (letters if kind == "text/plain" else json.dumps({"text": letters}, ensure_ascii=False)).encode()
    headers = [(b"content-type", kind.encode())]
    work = ask(client, "POST", "/v1/summaries", [body], None, headers)
    (status, _, answer), seconds = asyncio.run(longest_pause(work))
    assert (status, json.loads(answer)["detail"]) == (
        413,
        f"the text has {len(letters)} characters; at most {2**21} are allowed",
    )
    assert seconds < 0.4


def test_the_search_for_half_characters_is_fast(serve):
    client = serve(text_characters=2**23)
    body = json.dumps({"text": "x" * 8_000_000 + "\ud800"}).encode()
    work = ask(client, "POST", "/v1/summaries", [body], None, [(b"content-type", b"application/json")])
    (status, _, answer), seconds = asyncio.run(longest_pause(work))
    assert (status, "surrogate" in answer.decode()) == (400, True)
    assert seconds < 0.4


def test_a_body_of_lists_does_not_hold_up_other_requests(serve):
    client, body = serve(), b'{"a":[' + b"[]," * 2_500_000 + b"1]}"
    for path in ("/v1/summaries", "/v1/sessions"):
        work = ask(client, "POST", path, [body], None, [(b"content-type", b"application/json")])
        (status, _, answer), seconds = asyncio.run(longest_pause(work))
        assert (status, json.loads(answer)["detail"]) == (400, "the body must be a JSON object without lists")
        assert seconds < 0.4
