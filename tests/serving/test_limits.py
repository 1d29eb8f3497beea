"""Limits of the service: sizes of texts and sessions, clients that go away, texts that need too much memory, hosts."""

import asyncio
import functools
import json
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.inference.reading_session import ReadingSession
from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving import service
from summaries import WORDS

TEXT = " ".join(WORDS[:40])


def leave(client, method, path, content=b"", query=b"", when=lambda: True):
    """Send a request, and close the connection once `when` returns True. Return the messages of the answer."""
    messages, sent = [], []

    async def receive():
        if not sent:
            sent.append(True)
            return {"type": "http.request", "body": content, "more_body": False}
        while not when():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": query,
        "headers": [(b"host", b"testserver"), (b"content-type", b"text/plain")],
        "client": ("test", 1),
        "server": ("testserver", 80),
    }
    asyncio.run(client.app(scope, receive, send))
    return messages


def wait_until(is_true, seconds=20):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def slow_generation(summarizer, monkeypatch):
    """Let the decoder take 50 ms for each token, and note its calls."""
    calls, forward = [], summarizer.model.forward

    # generate reads the signature
    @functools.wraps(forward)
    def slow(*given, **named):
        calls.append(time.monotonic())
        time.sleep(0.05)
        return forward(*given, **named)

    monkeypatch.setattr(summarizer.model, "forward", slow)
    summarizer.generation.update(min_new_tokens=60, max_new_tokens=60)
    return calls


def test_a_text_and_a_session_have_a_largest_number_of_characters(serve, summarizer):
    client = serve(text_characters=len(TEXT), session_characters=len(TEXT) + 5)
    long = client.post("/v1/summaries", content=TEXT + "x")
    assert (long.status_code, long.json()) == (
        413,
        {"detail": f"the text has {len(TEXT) + 1} characters; at most {len(TEXT)} are allowed"},
    )
    id = client.post("/v1/sessions").json()["id"]
    assert client.post(f"/v1/sessions/{id}/text", content=TEXT + "x").status_code == 413
    assert client.post(f"/v1/sessions/{id}/text", content=TEXT).status_code == 200
    more = client.post(f"/v1/sessions/{id}/text", content=" at all")
    assert more.status_code == 413
    assert f"at most {len(TEXT) + 5} are allowed" in more.json()["detail"]
    # a piece that is sent again is no more text
    assert client.post(f"/v1/sessions/{id}/text?position=0", content=TEXT).json()["n_characters"] == len(TEXT)
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == summarizer(TEXT).text


def test_a_state_that_get_gives_is_never_larger_than_put_takes(serve):
    client = serve(state_bytes=150_000)
    ids = [client.post("/v1/sessions").json()["id"] for _ in range(2)]
    codes, size = [], 0
    while 413 not in codes and len(codes) < 100:
        codes.append(client.post(f"/v1/sessions/{ids[0]}/text", content=TEXT).status_code)
        size = len(client.get(f"/v1/sessions/{ids[0]}/state").content)
        assert size <= 150_000
    assert codes[0] == 200
    assert codes[-1] == 413
    state = client.get(f"/v1/sessions/{ids[0]}/state")
    assert int(state.headers["content-length"]) == len(state.content) > 75_000
    assert client.put(f"/v1/sessions/{ids[1]}/state", content=state.content).status_code == 200
    sizes = [client.get(f"/v1/sessions/{id}").json()["n_characters"] for id in ids]
    assert sizes == [len(TEXT) * (len(codes) - 1)] * 2


def test_a_state_replaces_an_unreadable_one(serve, tmp_path):
    client = serve(n_cached_sessions=1)
    first, second = (client.post("/v1/sessions").json()["id"] for _ in range(2))
    client.post(f"/v1/sessions/{first}/text", content=TEXT)
    state = client.get(f"/v1/sessions/{first}/state").content
    (tmp_path / "sessions" / f"{second}.safetensors").write_bytes(b"broken")
    assert client.get(f"/v1/sessions/{second}").status_code == 400
    assert client.put(f"/v1/sessions/{second}/state", content=state).json()["n_characters"] == len(TEXT)


@pytest.mark.slow
def test_a_long_text_does_not_hold_up_short_ones(serve, summarizer, monkeypatch):
    monkeypatch.setattr("recurrent_bart.serving.routes.LONG_CHARACTERS", 500)
    client, encode, sizes = serve(step_segments=2), summarizer.model.model.encode, []

    def slow(input_ids, *rest, **kwargs):
        sizes.append(input_ids.shape[1])
        time.sleep(0.03)
        return encode(input_ids, *rest, **kwargs)

    texts = TEXT * 2, "the"
    expected = [summarizer(text).text for text in texts]
    monkeypatch.setattr(summarizer.model.model, "encode", slow)
    id = client.post("/v1/sessions").json()["id"]
    for path in ("/v1/summaries", f"/v1/sessions/{id}/text", "/v1/summaries?stream=true"):
        sizes.clear()
        ends = []
        thread = threading.Thread(
            target=lambda path=path, ends=ends: (client.post(path, content=texts[0]), ends.append(time.monotonic()))
        )
        thread.start()
        wait_until(lambda: len(sizes) > 3)
        assert client.post("/v1/summaries", content=texts[1]).json()["summary"] == expected[1]
        assert not ends
        thread.join()
        assert max(sizes) <= 2
    assert client.post("/v1/summaries", content=texts[0]).json()["summary"] == expected[0]
    assert client.get(f"/v1/sessions/{id}/summary").json()["summary"] == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("query", [b"", b"stream=true", b"num_beams=2", b"num_beams=2&stream=true"])
def test_generation_ends_when_the_client_goes_away(serve, slow_generation, query):
    client = serve()
    n_threads = threading.active_count()
    leave(client, "POST", "/v1/summaries", TEXT.encode(), query, when=lambda: len(slow_generation) > 2)
    wait_until(lambda: not client.app.state.service.worker.n_pending)
    assert 3 <= len(slow_generation) < 50
    assert threading.active_count() == n_threads


@pytest.mark.slow
@pytest.mark.parametrize("query", [b"", b"stream=true", b"stream=true&citations=true"])
def test_a_section_whose_client_goes_away_is_not_ended(serve, slow_generation, query):
    client = serve()
    id = client.post("/v1/sessions").json()["id"]
    client.post(f"/v1/sessions/{id}/text", content=TEXT)
    leave(client, "POST", f"/v1/sessions/{id}/sections", query=query, when=lambda: len(slow_generation) > 2)
    wait_until(lambda: not client.app.state.service.worker.n_pending)
    assert 3 <= len(slow_generation) < 50
    assert client.get(f"/v1/sessions/{id}").json()["n_sections"] == 0
    section = client.post(f"/v1/sessions/{id}/sections?number=1&max_new_tokens=3&min_new_tokens=0").json()
    streamed = client.post(f"/v1/sessions/{id}/sections?number=1&stream=true").text
    assert json.loads(streamed.rsplit("data: ", 1)[1]) == {"summary": section["summary"]}
    assert client.get(f"/v1/sessions/{id}").json()["n_sections"] == 1


def test_queued_work_of_a_client_that_goes_away_is_never_done(serve, summarizer, monkeypatch):
    client, go = serve(), threading.Event()
    worker = client.app.state.service.worker
    ids = [client.post("/v1/sessions").json()["id"] for _ in range(2)]
    client.post(f"/v1/sessions/{ids[0]}/text", content=TEXT)
    seen, summarize = [], Summarizer.summarize_in_steps
    monkeypatch.setattr(Summarizer, "summarize_in_steps", lambda *given: seen.append(given) or summarize(*given))
    held = worker.add(service.Job(lambda _: go.wait(120)))
    for method, path, content in (
        ("POST", "/v1/summaries", b"the text"),
        ("POST", f"/v1/sessions/{ids[0]}/text", b"more"),
        ("POST", f"/v1/sessions/{ids[0]}/sections", b""),
        ("GET", f"/v1/sessions/{ids[0]}/summary", b""),
        ("DELETE", f"/v1/sessions/{ids[1]}", b""),
        ("POST", "/v1/sessions", b""),
    ):
        n_pending = worker.n_pending
        answer = leave(client, method, path, content, when=lambda n=n_pending: worker.n_pending > n)
        assert answer[0]["status"] == 499
    go.set()
    assert held.result.result(20)
    wait_until(lambda: not worker.n_pending)
    assert seen == []
    assert client.get(f"/v1/sessions/{ids[0]}").json() == {
        "id": ids[0],
        "n_characters": len(TEXT),
        "n_read": len(TEXT),
        "n_sections": 0,
    }
    assert client.get(f"/v1/sessions/{ids[1]}").status_code == 200
    assert client.app.state.service.sessions.count() == 2


def test_a_reading_whose_client_goes_away_leaves_the_session_as_it_was(serve, summarizer, monkeypatch):
    monkeypatch.setattr("recurrent_bart.serving.routes.LONG_CHARACTERS", 500)
    client, encode = serve(step_segments=1), summarizer.model.model.encode
    id = client.post("/v1/sessions").json()["id"]
    client.post(f"/v1/sessions/{id}/text", content=TEXT)
    expected = client.get(f"/v1/sessions/{id}/summary").json()

    calls = []

    def slow(*given, **named):
        calls.append(given)
        time.sleep(0.05)
        return encode(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(summarizer.model.model, "encode", slow)
        leave(client, "POST", f"/v1/sessions/{id}/text", (TEXT * 3).encode(), when=lambda: len(calls) > 2)
        wait_until(lambda: not client.app.state.service.worker.n_pending)
    assert client.get(f"/v1/sessions/{id}/summary").json() == expected


def test_a_text_that_does_not_fit_into_memory_fails_alone(serve, summarizer, monkeypatch):
    client, read = serve(), ReadingSession.read_to_end
    monkeypatch.setattr("recurrent_bart.serving.routes.LONG_CHARACTERS", 500)

    def fail(self):
        if self.n_characters > 500:
            raise torch.OutOfMemoryError(TEXT)
        return read(self)

    monkeypatch.setattr(ReadingSession, "read_to_end", fail)
    large = client.post("/v1/summaries", content=TEXT)
    assert (large.status_code, large.json()) == (413, {"detail": "the text needs more memory than the service has"})
    assert client.post("/v1/summaries", content=WORDS[0]).json()["summary"] == summarizer(WORDS[0]).text


def test_only_known_hosts_are_answered(serve):
    client = serve(allowed_hosts=("localhost", "[::1]", "Notes.example"))
    for host in ("localhost", "localhost:8000", "LOCALHOST", "[::1]:8000", "notes.example:1"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("rebound.example", "rebound.example:8000", "localhost.rebound.example", "[::1", "", "testserver"):
        for path in ("/", "/page.js", "/health", "/docs", "/openapi.json", "/v1/sessions/x", "/nothing"):
            answer = client.get(path, headers={"host": host, "origin": f"http://{host}"})
            assert answer.status_code == 403, (host, path)
            assert "--allowed_hosts" in answer.json()["detail"]
    assert json.loads(client.get("/health", headers={"host": "localhost"}).text) == {"status": "ok"}
