"""Lack of memory: idle sessions leave it before a request fails."""

import json

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from recurrent_bart.serving.service import Job
from summaries import WORDS

TEXT = " ".join(WORDS[:12])


def new(client, text=TEXT):
    id = client.post("/v1/sessions").json()["id"]
    assert client.post(f"/v1/sessions/{id}/text", content=text).status_code == 200
    return id


@pytest.fixture
def full(summarizer, monkeypatch):
    """Return a function that lets the encoder need memory that sessions hold, except the given number of sessions."""
    encode = summarizer.model.model.encode

    def fill(sessions, n_fit=1):
        def need(*given, **named):
            if len(sessions._opened) > n_fit:
                raise torch.OutOfMemoryError(TEXT)
            return encode(*given, **named)

        monkeypatch.setattr(summarizer.model.model, "encode", need)

    return fill


def test_idle_sessions_leave_memory_before_a_request_fails(serve, summarizer, full):
    client, expected = serve(), summarizer(TEXT).text
    sessions = client.app.state.service.sessions
    ids = [new(client) for _ in range(4)]
    full(sessions)
    requests = [
        ("POST", "/v1/summaries", TEXT),
        ("POST", "/v1/summaries?stream=true", TEXT),
        ("GET", f"/v1/sessions/{ids[0]}/summary", ""),
        ("GET", f"/v1/sessions/{ids[1]}/summary?stream=true", ""),
        ("POST", f"/v1/sessions/{ids[2]}/sections?number=1", ""),
        ("POST", f"/v1/sessions/{ids[3]}/sections?number=1&stream=true", ""),
    ]
    for method, path, content in requests:
        for id in ids:
            client.get(f"/v1/sessions/{id}")
        assert len(sessions._opened) == 4
        answer = client.request(method, path, content=content)
        assert answer.status_code == 200
        assert json.loads(answer.text.strip().rsplit("data: ", 1)[-1])["summary"] == expected
        assert len(sessions._opened) <= 1
    for id in ids:
        client.get(f"/v1/sessions/{id}")
    added = client.post(f"/v1/sessions/{ids[0]}/text?position={len(TEXT)}", content=f" {TEXT}")
    assert added.json()["n_characters"] == 2 * len(TEXT) + 1
    # no part of the piece was read twice
    assert client.get(f"/v1/sessions/{ids[0]}/summary").json()["summary"] == summarizer(f"{TEXT} {TEXT}").text


def test_a_text_that_is_too_large_alone_is_refused_and_otherwise_may_come_again(serve, full):
    client = serve()
    service = client.app.state.service
    full(service.sessions, n_fit=-1)
    for path in ("/v1/summaries", "/v1/summaries?stream=true"):
        answer = client.post(path, content=TEXT)
        assert "more memory than the service has" in answer.text
    assert client.post("/v1/summaries", content=TEXT).status_code == 413
    # another reading holds memory between its steps
    steps = service.sessions.with_memory(lambda: iter_forever())
    next(steps)
    answer = client.post("/v1/summaries", content=TEXT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "come again later" in answer.json()["detail"]
    steps.close()
    assert client.post("/v1/summaries", content=TEXT).status_code == 413


def iter_forever():
    while True:
        yield


def test_pieces_of_a_summary_are_never_sent_twice(serve):
    service = serve().app.state.service
    tries = []

    def write():
        tries.append(1)
        yield "a piece"
        raise torch.OutOfMemoryError

    job = service.worker.add(Job(lambda _: list(service.sessions.with_memory(write))))
    with pytest.raises(torch.OutOfMemoryError):
        job.result.result(20)
    assert len(tries) == 1
